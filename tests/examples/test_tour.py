"""The tour: its notebook is the plain file's, its links lead to the functions, and its cells hold."""

import json
import re

import make_tour
import pytest
from conftest import ROOT
from PIL import Image

PAGE = ROOT / "examples" / "tour.ipynb"
SOURCE = (ROOT / "examples" / "tour.py").read_text(encoding="utf-8")
CELLS = make_tour.cells(SOURCE)
NOTEBOOK = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
RENEW = "run: python examples/make_tour.py (or with --links, if only the text or a function's line has changed)"


def without_lines(text: str) -> str:
    """Links without their line numbers, which move whenever code above them changes."""
    return re.sub(r"(\.py)#L\d+", r"\1", text)


def test_the_notebook_is_of_the_plain_file():
    kept = [(cell["cell_type"], without_lines("".join(cell["source"]))) for cell in NOTEBOOK]
    assert kept == [(kind, without_lines(text)) for kind, text in CELLS], RENEW


@pytest.mark.slow
def test_links_lead_to_the_line():
    assert ["".join(cell["source"]) for cell in NOTEBOOK] == [text for _, text in CELLS], RENEW


def test_the_notebook_has_its_outputs_and_nothing_of_the_machine():
    code = [cell for cell in NOTEBOOK if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    text = PAGE.read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    assert "/home/" not in text and str(ROOT) not in text and "Traceback" not in text


def test_every_equation_is_visited_and_other_files_are_there():
    headings = re.findall(r"^# #+ .*", SOURCE, re.MULTILINE)
    visited = {int(number) for heading in headings for number in re.findall(r"Eq\. (\d+)", heading)}
    assert visited == set(range(1, 11))
    for _, text in CELLS:
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / "examples" / target).exists(), target


def test_algorithm_1_fits_in_a_cell():
    [cell] = [text for kind, text in CELLS if kind == "code" and "def algorithm_1" in text]
    assert len(cell.splitlines()) <= 25


def test_cells_run_as_in_a_notebook():
    source = '# %% [markdown]\n# See [`ddim.step`].\n\n# %%\nprint("a")\nx = 2\nx + 1\n\n# %%\nImage.new("L", (x, 1))\n'
    (kind, text), *code = make_tour.cells(source)
    assert kind == "markdown" and re.fullmatch(r"See \[`ddim.step`\]\(\.\./isadca/ddim\.py#L\d+\)\.", text)
    scope = {"Image": Image}
    first, second = (make_tour.run(cell, f"<test {i}>", scope) for i, (_, cell) in enumerate(code))
    assert [output.get("text") or output["data"]["text/plain"] for output in first] == [["a\n"], ["3"]]
    assert [*second[0]["data"]] == ["image/png", "text/plain"]


def test_the_text_is_renewed_without_a_run_and_not_under_other_code(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "tour.ipynb"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    make_tour.main(["--links", "-o", str(copy)])
    renewed = json.loads(copy.read_text(encoding="utf-8"))["cells"]
    assert ["".join(cell["source"]) for cell in renewed] == [text for _, text in CELLS]
    assert [cell.get("outputs") for cell in renewed] == [cell.get("outputs") for cell in NOTEBOOK]
    monkeypatch.setattr(make_tour, "cells", lambda source: [*CELLS, ("code", "1 + 1")])
    with pytest.raises(SystemExit, match="run without --links"):
        make_tour.main(["--links", "-o", str(copy)])
