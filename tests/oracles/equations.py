"""The paper's equations: the function that is each one, and the vectors and the test that hold it.

The functions are read off the docstrings ("Eq. 5: ..."). To write the tables of README.md and tests/README.md anew:

    python tests/oracles/equations.py
"""

import ast
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import ROOT
from house import FUNCTIONS, SOURCES, claims


class Proof(NamedTuple):
    about: str                  # what the equation is, in README's words
    vectors: dict[str, str]     # function of tests/vectors -> one of its cases
    test: str                   # below tests/
    also: str = ""              # what README says after the function


ALGORITHM = "Algorithm 1"
PROOFS = {
    2: Proof("forward diffusion", {"add_noise": "to 981"}, "heart/test_ddim.py::test_predict_x0_undoes_add_noise"),
    3: Proof("reverse step", {"ddim_step": "981 to 961"}, "heart/test_ddim.py::test_trajectories_equal_diffusers"),
    4: Proof("inversion", {"ddim_inverse_step": "961 to 981"}, "heart/test_ddim.py::test_inverse_step_undoes_step",
             ", looped in [`reference.invert`](isadca/reference.py)"),
    5: Proof("ISA", {"isa": "append, one reference row", "isa_layer": "from hidden states"},
             "heart/test_attention.py::test_capture_then_isa_is_eq_5"),
    6: Proof("attention", {"attention": "more keys than queries"},
             "heart/test_attention.py::test_kernel_is_the_formula", "; fused: `attend`"),
    7: Proof("the image's keys and values", {"image_keys_values": "base"},
             "networks/test_ip_adapter.py::test_decoupled_cross_attention_is_diffusers"),
    8: Proof("DCA", {"dca": "base, 4 tokens", "dca_layer": "from hidden states"},
             "heart/test_attention.py::test_dca_is_eqs_7_and_8"),
    9: Proof("λ", {"algorithm1": "lambda linear"},
             "heart/test_loop.py::test_eq_9_holds_for_any_lam_scale_guidance_and_step"),
    10: Proof("reverse step", {"ddim_step": "1 to -19"}, "heart/test_ddim.py::test_step_is_the_textbook_map"),
    ALGORITHM: Proof("", {"algorithm1": "isadca"}, "heart/test_rival.py::test_rival_presets_take_rivals_path"),
}


def function_of(equation: int | str) -> str:
    """Its dotted name. `claims` may have several, which a test forbids."""
    return claims()[equation][0]


def imported(dotted: str):
    """The function or method of a dotted name such as networks.ip_adapter.IPAdapter.keys_values."""
    module = next(name for name in sorted(SOURCES, key=len, reverse=True) if dotted.startswith(f"{name}."))
    found = importlib.import_module(f"isadca.{module}")
    for name in dotted.removeprefix(f"{module}.").split("."):
        found = getattr(found, name)
    return found


def defines(test: str) -> bool:
    """Whether a node id below tests/, such as heart/test_ddim.py::test_x, is a function of that file."""
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return any(isinstance(node, FUNCTIONS) and node.name == name for node in tree.body)


# ---- tables --------------------------------------------------------------------------------------------------

def link(equation: int | str) -> str:
    """[`ddim.step`](isadca/ddim.py): the last two parts of the name are enough."""
    dotted = function_of(equation)
    path = next(path for name, path in SOURCES.items() if dotted.startswith(f"{name}.") and path.suffix == ".py"
                and not name.endswith("__init__"))
    short = ".".join(dotted.split(".")[-2:])
    return f"[`{short}`]({path.relative_to(ROOT).as_posix()})"


def readme_table() -> list[str]:
    """One row a function; a function that is two equations of one name has both in its row."""
    rows = {}
    for equation, proof in PROOFS.items():
        rows.setdefault((link(equation) + proof.also, proof.about), []).append(str(equation))
    lines = ["| equation | function |", "|---|---|"]
    for (function, about), numbers in rows.items():
        name = numbers[0] if numbers == [ALGORITHM] else f"Eq{'s' * (len(numbers) > 1)}. {' and '.join(numbers)}"
        lines.append(f"| {', '.join(filter(None, [name, about]))} | {function} |")
    return lines


def tests_table() -> list[str]:
    """What holds each equation: a vector and a test."""
    lines = ["| equation | function | vectors | test |", "|---|---|---|---|"]
    for equation, proof in PROOFS.items():
        vectors = ", ".join(f"`{function}`: {case}" for function, case in proof.vectors.items())
        file, name = proof.test.split("::")
        short = ".".join(function_of(equation).split(".")[-2:])
        lines.append(f"| {equation} | `{short}` | {vectors} | [`{name}`]({file}) |")
    return lines


TABLES = {"README.md": readme_table, "tests/README.md": tests_table}


def with_table(page: str, table: list[str]) -> str:
    """The page with its table of the same header replaced."""
    lines = page.split("\n")
    start = lines.index(table[0])
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return "\n".join([*lines[:start], *table, *lines[end:]])


if __name__ == "__main__":
    for name, make in TABLES.items():
        page = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(with_table(page, make()), encoding="utf-8")
