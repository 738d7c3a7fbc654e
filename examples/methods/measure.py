"""Every method of this folder, the presets, and your own, on the demo's pairs: the table and the sheet of README.md.

    python examples/methods/measure.py [FILE.py:NAME ...] [--pairs 20] [--steps 25] [--only NAMES] [--sheet SHEET.png]
    python examples/methods/measure.py --into examples/methods/README.md

The judge (../train_demo/demo_judge.py, which shares nothing with the networks that it judges) says whether a variation
shows the prompt's noun, and the reference R's colour, pattern and style. SSIM is to R. CPU seconds are of one picture.
"""

import argparse
import csv
import datetime
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import isadca
from isadca.app.own_code import own_method
from isadca.common.images import to_tensor
from isadca.evaluation.metrics import ssim

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "weights" / "demo"
sys.path.insert(0, str(HERE.parent / "train_demo"))
SCRIPTS = ("measure", "claims", "inversion")  # of this folder; its other files are methods
PRESETS = ("plain", "ip-adapter", "isadca", "rival-edit", "masactrl")
HEAD = ("system", "prompt's noun", "R's colour", "R's pattern", "SSIM to R", "CPU s")
shared: dict = {}  # what each process has loaded


def systems(own: list[str], only: list[str] | None = None) -> dict[str, isadca.Method]:
    """By name: the presets, then the folder's methods (of both, those in `only`), then FILE.py:NAME."""
    files = [path for path in sorted(HERE.glob("*.py")) if path.stem not in SCRIPTS]
    folder = [own_method(f"{path}:{path.stem.upper()}")[0] for path in files]
    published = {name: isadca.PRESETS[name] for name in PRESETS} | {method.name: method for method in folder}
    for name in only or ():
        if name not in published:
            raise isadca.Problem(f"--only has {name}, expected some of {', '.join(published)}")
    return ({name: method for name, method in published.items() if only is None or name in only}
            | {where: own_method(where)[0] for where in own})


def start(own: list[str], steps: int, only: list[str] | None = None) -> None:
    """Load everything, once a process."""
    from demo_judge import HEADS, Judge
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    judge = Judge()
    judge.load_state_dict(load_file(DEMO / "judge/model.safetensors"))
    shared.update(model=isadca.load(DEMO, device="cpu", dtype="fp32"), judge=judge.float().eval(), heads=HEADS,
                  systems=systems(own, only), steps=steps)


def verdict(picture) -> dict[str, str]:
    """What the judge sees."""
    seen = shared["judge"](to_tensor(picture))
    return {name: shared["heads"][name][logits.argmax().item()] for name, logits in seen.items()}


def judged(made, prompt: str, picture, seen: dict[str, str]) -> list[float]:
    """Whether `made` shows the prompt's noun, and R's colour and pattern, 100 or 0; its SSIM to R, `picture`."""
    shows = verdict(made)
    shares = [100 * (shows["noun"] == prompt.split()[-1]),
              *(100 * (shows[name] == seen[name]) for name in ("colour", "pattern"))]
    return [*shares, ssim(*map(to_tensor, (made, picture))).item()]


def styled(model, method: isadca.Method, style, prompt: str, seeds):
    """StyleID has a content picture in place of a prompt: what `plain` makes of the prompt. R is the style."""
    [content] = isadca.vary(model, style, prompt, "plain", seeds=seeds)
    ref = isadca.invert(model, content, style.steps)
    return isadca.vary(model, ref, "", method, seeds=seeds, also=[style])


def measure(pairs: list[tuple[str, str]]) -> list[tuple]:
    """The pairs of one reference -> (system, prompt, R, picture, numbers) each, for every system."""
    model, picture, found = shared["model"], isadca.load_image(DEMO / "pairs" / pairs[0][0]), []
    seen = verdict(picture)
    told = {False: "", True: f"a {seen['noun']}"}  # methods that read the reference's maps must know what it shows
    refs = {maps: isadca.invert(model, picture, shared["steps"], prompt) for maps, prompt in told.items()}
    kept = {maps: list(isadca.replay(model, ref, maps=maps)) for maps, ref in refs.items()}
    for name, method in shared["systems"].items():
        for _, prompt in pairs:
            began, maps = time.process_time(), method.ref_maps
            if name == "style-id":
                [made] = styled(model, method, refs[False], prompt, seeds=(1,))
            else:
                [made] = isadca.vary(model, refs[maps], prompt, method, seeds=(1,), replayed=kept[maps])
            took = time.process_time() - began
            found.append((name, prompt, picture, made, (*judged(made, prompt, picture, seen), took)))
    return found


def table(found: list[tuple]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for name in dict.fromkeys(row[0] for row in found):
        *shares, similarity, seconds = np.mean([row[-1] for row in found if row[0] == name], axis=0)
        lines.append(f"| {name} | {' | '.join(f'{x:.0f} %' for x in shares)} | {similarity:.2f} | {seconds:.1f} |")
    return "\n".join(lines)


def sheet(found: list[tuple], columns: int = 6):
    """A row for each system, a column for each of the first pairs; the references on top."""
    names = list(dict.fromkeys(row[0] for row in found))
    own = {name: [row for row in found if row[0] == name][:columns] for name in names}
    rows = [[row[2] for row in own[names[0]]], *([row[3] for row in own[name]] for name in names)]
    return isadca.contact_sheet(rows, [row[1] for row in own[names[0]]], ["reference", *names])


def put(text: str, page: Path, name: str) -> None:
    """`text` in place of what stands between <!-- name --> and <!-- end -->."""
    before, rest = page.read_text(encoding="utf-8").split(f"<!-- {name} -->")
    _, after = rest.split("<!-- end -->", 1)
    page.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- end -->{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own", nargs="*", metavar="FILE.py:NAME", help="a Method, or a function Controls -> Attend")
    parser.add_argument("--pairs", type=int, default=20, help="the first so many (%(default)s)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--only", type=lambda names: names.split(","), help="some of the published: isadca,nag")
    parser.add_argument("--sheet", type=Path, help="the pictures of the first pairs")
    parser.add_argument("--into", type=Path, help="a README: its table is replaced, and measured.png beside it")
    args = parser.parse_args()
    try:
        systems(args.own, args.only)  # refuses what is not there before the processes start
    except isadca.Problem as problem:
        parser.error(str(problem))
    with open(DEMO / "pairs/pairs.csv", encoding="utf-8") as file:
        pairs = [(row["reference"], row["prompt"]) for row in csv.DictReader(file)][:args.pairs]
    tasks = [list(group) for _, group in groupby(pairs, lambda pair: pair[0])]
    cores, began = os.cpu_count(), time.monotonic()
    with ProcessPoolExecutor(cores, get_context("spawn"), start, (args.own, args.steps, args.only)) as pool:
        found = sum(pool.map(measure, tasks), [])
    text = (f"{table(found)}\n\n*{len(pairs)} pairs, {args.steps} steps, {cores} cores, {datetime.date.today()}, "
            f"{(time.monotonic() - began) / 60:.0f} minutes.*")
    print(text)
    if args.into:
        put(text, args.into, "measured")
    if args.into or args.sheet:
        where = args.sheet or args.into.with_name("measured.png")
        sheet(found).quantize().save(where, optimize=True)  # a quarter of the size


if __name__ == "__main__":
    main()
