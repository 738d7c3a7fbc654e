"""What keeps the house small and its pages readable: lines that a reader meets, words of the README, one place for
each idea. Each limit is one that has been crossed before."""

import ast
import re
import shlex

import pytest
from conftest import ROOT
from house import FUNCTIONS, PACKAGE, SOURCES, TREES, room, run_python

from isadca.app.flags import parser

PAGES = sorted(path for folder in ("", "isadca", "examples", "weights", "tests")
               for path in (ROOT / folder).glob("*.md" if folder == "" else "**/*.md") if ".train" not in path.parts)
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """What stands between ``` and ```."""
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """GitHub's: lower case, without punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# lines; both may only be lowered. The second was 6,482 until 2026-11-29, when a trial by users found pictures of theirs
# replaced, pipes waited for, replays misread in silence, and guesses in Python answered by a traceback.
CORE, PACKAGE_LINES = 2678, 6659


def lines(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# ---- lines ---------------------------------------------------------------------------------------------------

def test_what_load_invert_and_vary_import_does_not_grow(tmp_path):
    """Counted in a fresh process, so that an import within a function counts, too. The aim is 2,300 lines."""
    code = """
import sys, isadca
model = isadca.load(device="cpu")
ref = isadca.invert(model, isadca.load_image(isadca.default_weights() / "references/cat.png"), 1)
isadca.vary(model, ref, "a lemon")
print(*[name for name in sys.modules if name.partition(".")[0] == "isadca"])"""
    names = {name.removeprefix("isadca").removeprefix(".") for name in run_python(code, tmp_path).split()}
    counts = {name: lines(SOURCES.get(name or "__init__") or SOURCES[f"{name}.__init__"]) for name in names}
    assert sum(counts.values()) <= CORE, counts
    assert {room(name) for name in names} & {"evaluation"} == set()


def test_the_package_does_not_grow():
    """The aim is 5,000 lines."""
    assert sum(map(lines, [*SOURCES.values(), PACKAGE / "__init__.pyi"])) <= PACKAGE_LINES


def test_no_file_beside_the_package_is_long():
    """As in the package, 300 lines; the tour is a notebook, read from top to bottom."""
    found = {path.name: lines(path) for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py")}
    assert {name for name, n in found.items() if n > 300} == {"tour.py"}


# ---- one place -----------------------------------------------------------------------------------------------

# the commands are named after the functions that they call
SAME_NAME = {"vary", "invert", "reconstruct", "explore", "evaluate", "fetch", "convert", "inspect", "check"}


def test_no_two_things_have_one_name():
    """Of two functions or classes of one name a reader opens the wrong one."""
    places = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):  # a file's own affair
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items()
            if len(modules) > 1 and not (name in SAME_NAME and any(room(m) == "app" for m in modules))} == {}


def test_no_number_of_the_published_models_is_written_twice():
    """Scaling factors, betas, CLIP's mean: numbers of five digits and more."""
    places = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, float):
                digits = f"{node.value:.12g}".partition("e")[0].replace(".", "").strip("0")
                if len(digits) >= 5:
                    places.setdefault(node.value, set()).add(module)
    assert {number: modules for number, modules in places.items() if len(modules) > 1} == {}


# ---- pages ---------------------------------------------------------------------------------------------------

def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1400


def test_the_readmes_code_is_not_cut_off_at_githubs_width():
    assert [line for block in blocks(README) for line in block.splitlines() if len(line) > 88] == []


@EACH_PAGE
def test_tables_have_at_most_six_columns(page):
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    # what measure_demo.py writes is data, which README.md beside it shows in part
    assert page.name == "measured.md" or max((line.replace("\\|", "").count("|") - 1 for line in rows), default=0) <= 6


@EACH_PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, part = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if part:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, headings), f"{page.name} links to {target}"


@EACH_PAGE
def test_commands_have_the_flags_that_the_parser_has(page):
    """Every `isadca ...` line of a block is parsed, not run."""
    _, commands = parser()
    for block in blocks(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("isadca "):
                command, *argv = shlex.split(line, comments=True)[1:]
                commands[command].parse_intermixed_args(argv)


def test_the_readmes_python_names_only_what_is_public():
    import isadca
    used = {name for block in blocks(README) for name in re.findall(r"\bisadca\.(\w+)\(", block)}
    assert used and used <= set(isadca.__all__)
