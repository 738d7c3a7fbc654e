"""The package's own source, read with `ast`: its functions, imports, equations, and the ladder of its folders."""

import ast
import os
import re
import subprocess
import sys
from functools import lru_cache

import pytest
from conftest import ROOT

PACKAGE = ROOT / "isadca"
SOURCES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
           for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
EACH_MODULE = pytest.mark.parametrize("module", SOURCES)

NUMBERS = re.compile(r"\bEqs?\.\s+(\d+(?:(?:\s*[-–,]\s*|\s+and\s+)\d+)*)")

# the rooms of the house, a folder or an open file each; a room imports from the rungs before its own only
LADDER = [["common"], ["attention", "ddim", "methods"], ["networks"], ["speed"], ["reference", "loading"], ["loop"],
          ["evaluation"], ["app"], ["__main__"]]
THIRD_PARTY = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "tqdm", "huggingface_hub"}
DISTRIBUTIONS = {"PIL": "pillow"}  # where it is not the module's name

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(node, prefix: str):
    """Every function below `node`, methods and inner functions too, with its dotted name."""
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            inner = f"{prefix}.{child.name}"
            if isinstance(child, FUNCTIONS):
                yield inner, child
        yield from functions(child, inner)


def cited(text: str) -> set[int]:
    """"Eq. 5", "Eqs. 3 and 10", "Eqs. 5-8" -> the numbers."""
    found = set()
    for group in NUMBERS.findall(text):
        for part in re.split(r"\s*,\s*|\s+and\s+", group):
            first, *last = map(int, re.split(r"\s*[-–]\s*", part))
            found |= set(range(first, (last or [first])[0] + 1))
    return found


@lru_cache
def claims() -> dict[int | str, list[str]]:
    """Equation of the paper, by its number, and "Algorithm 1" -> the functions whose docstrings say so."""
    found = {}
    for module, tree in TREES.items():
        for name, function in functions(tree, module):
            text = ast.get_docstring(function) or ""
            for equation in [*sorted(cited(text)), *["Algorithm 1"] * ("Algorithm 1" in text)]:
                found.setdefault(equation, []).append(name)
    return found


def imports(module: str) -> list[tuple[str, bool]]:
    """(module, whether it is the package's own), lazy imports too. "" is the package itself."""
    found, parts = [], module.split(".")
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = "".join(f"{part}." for part in parts[:-node.level])  # "" or "loading."
            target = package + (node.module or "")
            inside = [f"{target}.{alias.name}".lstrip(".") for alias in node.names]
            found += [(name if name in SOURCES else target.rstrip("."), True) for name in inside]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, False))
    return found


def outside(module: str) -> set[str]:
    """Top-level names that a module imports beyond the standard library and the package."""
    roots = {name.split(".")[0] for name, own in imports(module) if not own}
    return roots - sys.stdlib_module_names


def room(module: str) -> str:
    """The folder or the open file that a module is in."""
    return module.split(".")[0]


def run_python(code: str, cwd) -> str:
    """A fresh interpreter's standard output. This process has imported isadca, so its environment may be changed."""
    env = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT") if key in os.environ}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env=env | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout
