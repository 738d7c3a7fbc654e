"""What the package promises about itself: its parts are explained, stay small and in order, and it is light to import.
Read off the source with `ast`."""

import ast
import re

import pytest
from conftest import ROOT
from house import (DISTRIBUTIONS, EACH_MODULE, FUNCTIONS, LADDER, PACKAGE, SOURCES, THIRD_PARTY, TREES, functions,
                   imports, outside, room, run_python)

import isadca


# ---- text ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", isadca.__all__)
def test_what_is_exported_exists_and_is_explained(name):
    """The source is asked: a dataclass without a docstring would be given one by Python."""
    assert hasattr(isadca, name)
    defined = {node.name: node for node in TREES[isadca._MODULE[name]].body
               if isinstance(node, (*FUNCTIONS, ast.ClassDef))}
    if name in defined:
        assert ast.get_docstring(defined[name]), f"{name} has no docstring"
    else:
        assert name.isupper(), f"{name} is neither a function, a class nor a constant of {isadca._MODULE[name]}"


def test_type_checkers_see_the_names_that_are_exported():
    """__init__.pyi is what they read; a name that is missing there would have no type."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    froms = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in froms for alias in node.names} == isadca._MODULE
    assert (PACKAGE / "py.typed").is_file()


def test_completion_offers_the_public_names_and_nothing_else():
    assert {name for name in dir(isadca) if not name.startswith("_")} == set(isadca.__all__)


@EACH_MODULE
def test_a_module_says_what_it_is(module):
    assert ast.get_docstring(TREES[module]) or module == "__main__"


# ---- size ----------------------------------------------------------------------------------------------------

@EACH_MODULE
def test_sizes(module):
    """Files of at most 300 lines, functions of 40, lines of 120 characters."""
    lines = SOURCES[module].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    assert [(i, len(line)) for i, line in enumerate(lines, 1) if len(line) > 120] == []
    lengths = {name: f.end_lineno - f.lineno + 1 for name, f in functions(TREES[module], module)}
    assert {name: n for name, n in lengths.items() if n > 40} == {}


# ---- order ---------------------------------------------------------------------------------------------------

def test_every_room_has_its_rung():
    rooms = {room(module) for module in SOURCES if module != "__init__"}
    assert sorted(sum(LADDER, [])) == sorted(rooms), "put the new room on the ladder"


@EACH_MODULE
def test_nothing_imports_upward(module):
    """Within functions neither. The package itself, "", is for `__version__` alone; it imports nothing."""
    own = {name for name, ours in imports(module) if ours}
    if module.endswith("__init__"):
        assert own == set()
        return
    rung = next(i for i, rooms in enumerate(LADDER) if room(module) in rooms)
    below = {"", room(module), *sum(LADDER[:rung], [])} if module != "attention" else set()
    assert {room(name) for name in own} <= below
    assert "isadca" not in outside(module), "import relatively, so that a copy under another name works"


def test_no_room_has_a_circle():
    """Files of one folder stand on a ladder of their own."""
    needs = {module: {name for name, ours in imports(module) if ours and room(name) == room(module)}
             for module in SOURCES}
    while free := [module for module, names in needs.items() if not names & needs.keys()]:
        for module in free:
            del needs[module]
    assert needs == {}


@EACH_MODULE
def test_third_party_imports(module):
    """attention.py can be lifted out of the repository: torch is all it needs (nor does it import its siblings)."""
    assert outside(module) <= ({"torch"} if module == "attention" else THIRD_PARTY)


def test_setup_declares_what_is_imported():
    declared = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL).group(1)
    used = set().union(*map(outside, SOURCES))
    assert set(re.findall(r'"([a-z_]+)', declared)) == {DISTRIBUTIONS.get(name, name) for name in used}


@EACH_MODULE
def test_only_the_app_prints(module):
    calls = [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert calls == [] or room(module) == "app"


# ---- imports that run ------------------------------------------------------------------------------------------

def test_help_does_not_wait_for_torch(tmp_path):
    """Nor does --version, a command's help, or the message about a mistyped flag."""
    code = f"""
import contextlib, io, sys
from isadca.app.cli import main
for argv in ["--help"], ["--version"], ["vary", "--help"], ["sweep", "--nonsense"], []:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(argv)
print(sorted(set({sorted(THIRD_PARTY)}) & sys.modules.keys()))"""
    assert run_python(code, tmp_path) == "[]\n"


def test_importing_isadca_imports_nothing_else(tmp_path):
    code = """
import sys
before = set(sys.modules)
import isadca
print(sorted({name.split(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names))"""
    assert run_python(code, tmp_path) == "['isadca']\n"


def test_a_cold_start_does_not_import_torchs_compiler(tmp_path):
    """800 modules and 1.4 s that initial values on the meta device would cost; nor does running need them."""
    code = """
import sys, isadca
model = isadca.load(device="cpu")
ref = isadca.invert(model, isadca.load_image(isadca.loading.load.default_weights() / "references/cat.png"), 1)
isadca.vary(model, ref, "a lemon")
print([name for name in ("torch._dynamo", "sympy", "torch._inductor") if name in sys.modules])"""
    assert run_python(code, tmp_path) == "[]\n"


def test_importing_every_module_leaves_the_process_as_it_was(tmp_path):
    """No seeds, dtypes, threads, warning filters, environment variables or files."""
    code = f"""
import os, signal, sys, threading, warnings
import numpy, PIL.Image, PIL.ImageDraw, PIL.ImageFont, PIL.ImageOps, PIL.PngImagePlugin, safetensors.torch
import tokenizers, torch, tqdm
def state():
    return dict(environment=dict(os.environ), path=list(sys.path), filters=list(warnings.filters),
                dtype=torch.get_default_dtype(), threads=(torch.get_num_threads(), threading.active_count()),
                rng=torch.get_rng_state().tolist(), numpy_rng=str(numpy.random.get_state()),
                grad=torch.is_grad_enabled(), deterministic=torch.are_deterministic_algorithms_enabled(),
                tf32=torch.backends.cuda.matmul.allow_tf32, pixels=PIL.Image.MAX_IMAGE_PIXELS,
                interrupt=signal.getsignal(signal.SIGINT), files=os.listdir())
before = state()
for name in {[name for name in SOURCES if name != "__main__"]}:
    __import__("isadca." + name)
after = state()
print([key for key in before if before[key] != after[key]])"""
    assert run_python(code, tmp_path) == "[]\n"
