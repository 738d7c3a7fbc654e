"""Make tour.ipynb from tour.py: run every cell from top to bottom and keep what it shows.

    python examples/make_tour.py             # run it all
    python examples/make_tour.py --links     # only renew the text and its links; outputs stay

tour.py is plain Python: `# %%` begins a cell, `# %% [markdown]` a cell of text. In the text, [`ddim.step`] becomes a
link to that function's line. Nothing of Jupyter is needed: a notebook is JSON, and running a cell is `exec`.
"""

import argparse
import ast
import base64
import importlib
import inspect
import io
import json
import linecache
import re
from contextlib import redirect_stdout
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).parent
TEXT = "[markdown]"


def cells(source: str) -> list[tuple[str, str]]:
    """("markdown" or "code", its text), in order. What stands above the first `# %%` is left out."""
    found = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == TEXT:
            found.append(("markdown", linked(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))))
        else:
            found.append(("code", body.strip()))
    return found


def linked(text: str) -> str:
    """Names of functions, written as [`ddim.step`], with a link to the line where each begins."""
    return re.sub(r"\[`([\w.]+)`\](?!\()", lambda found: f"{found[0]}({link(found[1])})", text)


def link(name: str) -> str:
    """loop.sample -> ../isadca/loop.py#L104. Raises AttributeError where there is no such name."""
    module, *rest = name.split(".")
    thing = importlib.import_module(f"isadca.{module}")
    for part in rest:
        if inspect.ismodule(thing) and not hasattr(thing, part):
            importlib.import_module(f"{thing.__name__}.{part}")
        thing = getattr(thing, part)
    file = Path(inspect.getsourcefile(thing)).relative_to(HERE.parent.resolve())
    return f"../{file.as_posix()}#L{inspect.getsourcelines(thing)[1]}"


def run(source: str, name: str, scope: dict) -> list[dict]:
    """Run one cell. What it printed and the value of its last line, as a notebook's outputs."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # so that an error shows its line
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), name, "exec"), scope)
        value = eval(compile(ast.Expression(last.value), name, "eval"), scope) if last else None
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())})
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": shown(value)})
    return outputs


def shown(value) -> dict:
    if not isinstance(value, Image.Image):
        return {"text/plain": lines(repr(value))}
    file = io.BytesIO()
    value.save(file, "PNG", optimize=True)
    return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["a picture"]}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def notebook(parts: list[tuple[str, str]], outputs: list[list[dict]]) -> str:
    """The file's text; `outputs` has one entry for each cell of code."""
    ready, made, count = iter(outputs), [], 0
    for i, (kind, source) in enumerate(parts):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": lines(source)}
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": next(ready)}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
             "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE / "tour.ipynb")
    parser.add_argument("--links", action="store_true", help="keep the outputs, renew the text and its links")
    args = parser.parse_args(argv)
    parts = cells((HERE / "tour.py").read_text(encoding="utf-8"))
    code = [source for kind, source in parts if kind == "code"]
    if args.links:
        kept = [cell for cell in json.loads(args.out.read_text(encoding="utf-8"))["cells"] if "outputs" in cell]
        if ["".join(cell["source"]) for cell in kept] != code:
            raise SystemExit(f"{args.out}: its code is not that of tour.py; run without --links")
        outputs = [cell["outputs"] for cell in kept]
    else:
        torch.set_num_threads(1)  # the same sums in the same order on every machine of one kind
        scope = {"__name__": "__main__"}
        outputs = [run(source, f"<cell {i}>", scope) for i, source in enumerate(code, 1)]
    args.out.write_text(notebook(parts, outputs), encoding="utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
