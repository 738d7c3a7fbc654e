"""The conformance vectors: isadca and the NumPy oracle pass them, a wrong implementation fails each, and they are what
make.py makes. README.md specifies them."""

import ast
import inspect
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import isadca_adapter
import numpy_isadca
import run
import wrong_adapter
from cases import HERE as VECTORS, File, distance, read_all

CASES = defaultdict(list)
for case in read_all():
    CASES[case.function].append(case)
README = (VECTORS / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made():
    """Everything that make.py writes, made anew: vectors by function and name, model files by path."""
    import make
    return {(case.function, case.name): case for some in make.cases().values() for case in some}, make.model_files()


# ---- who passes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [isadca_adapter, numpy_isadca], ids=["isadca", "numpy"])
@pytest.mark.parametrize("function", CASES)
def test_passes(module, function):
    outcomes = [run.check(module, case) for case in CASES[function]]
    assert {o.verdict for o in outcomes} == {"pass"}, [(o.case.name, o.reason) for o in outcomes]


@pytest.mark.parametrize("function", CASES)
def test_a_wrong_implementation_fails_every_vector(function):
    outcomes = [run.check(wrong_adapter, case) for case in CASES[function]]
    assert {o.verdict for o in outcomes} == {"fail"}, [(o.case.name, o.reason) for o in outcomes]


@pytest.mark.parametrize("function", ["unet", "vae_decode", "clip_image", "image_tokens", "dca", "adain"])
def test_float32_passes_with_its_own_tolerance_and_not_with_float64s(function):
    assert {run.check(numpy_isadca, case, single=True).verdict for case in CASES[function]} == {"pass"}
    rounded = type("Rounded", (), {function: staticmethod(lambda **arguments: getattr(numpy_isadca, function)(
        **{name: run.prepared(value, True) for name, value in arguments.items()}))})
    assert {run.check(rounded, case).verdict for case in CASES[function]} == {"fail"}


# ---- mistakes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", wrong_adapter.THIRTEEN)
def test_each_of_the_thirteen_is_known_by_name(what):
    """Made in a running implementation, it is named by a vector, and no vector names another mistake instead."""
    function, mistaken = wrong_adapter.THIRTEEN[what]
    module = type("Mistaken", (), {function: staticmethod(mistaken)})
    known = [case for case in CASES[function] if what in case.mistakes]
    outcomes = [run.check(module, case) for case in known]
    assert known and all(o.reason.endswith(f"it looks like this: {what}") for o in outcomes), outcomes


def test_what_is_near_nothing_known_is_not_given_a_name():
    [case] = CASES["adain"]
    outcome = run.judge(case, case.expected + 1, case.tolerance)
    assert outcome.verdict == "fail" and "looks like" not in outcome.reason and "off by 1.0e+00" in outcome.reason


@pytest.mark.parametrize("result, says", [
    (np.zeros((2, 4, 3)), "has the shape (2, 4, 3), expected (2, 4, 3, 5)"),
    (np.full((2, 4, 3, 5), np.nan), "holds inf or NaN")])
def test_another_shape_and_nan_are_said(result, says):
    [case] = CASES["adain"]
    assert says in run.judge(case, result, case.tolerance).reason


def test_an_error_is_reported_and_not_raised():
    def adain(x, ref):
        raise ZeroDivisionError("by nothing")
    [outcome] = [run.check(type("Failing", (), {"adain": staticmethod(adain)}), case) for case in CASES["adain"]]
    assert outcome[1:] == ("fail", "raises ZeroDivisionError: by nothing")


# ---- the command -----------------------------------------------------------------------------------------------

def test_the_command_says_pass_fail_and_not_offered_and_exits_accordingly(capsys, tmp_path):
    assert run.main([str(VECTORS / "numpy_isadca.py"), "--only", "guide"]) == 0
    assert capsys.readouterr().out == "guide                 pass   3 of 3\n"
    assert run.main([str(VECTORS / "wrong_adapter.py"), "--only", "dca_layer"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "dca_layer             fail   0 of 1"
    (tmp_path / "only_guide.py").write_text("def guide(eps_u, eps_c, m):\n    return eps_u + m * (eps_c - eps_u)\n")
    assert run.main([str(tmp_path / "only_guide.py")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES) and "guide                 pass   3 of 3" in lines
    assert "adain                 not offered" in lines


# ---- the files -------------------------------------------------------------------------------------------------

def test_make_reproduces_the_vectors(made):
    made = dict(made[0])
    for case in (case for some in CASES.values() for case in some):
        again = made.pop((case.function, case.name))
        assert (again.tolerance, again.mistakes.keys()) == (case.tolerance, case.mistakes.keys())
        assert again.arguments.keys() == case.arguments.keys()
        for name, value in case.arguments.items():
            if isinstance(value, np.ndarray):
                assert distance(again.arguments[name], value) <= 1e-9, (case.function, case.name, name)
            else:
                assert again.arguments[name] == value
        assert distance(again.expected, case.expected) <= case.tolerance, (case.function, case.name)
        for what, value in case.mistakes.items():
            assert distance(again.mistakes[what], value) <= max(case.tolerance, 1e-9), (case.function, case.name, what)
    assert not made, "made, but in no file"


def test_make_reproduces_the_tiny_model(made):
    files = {str(path.relative_to(VECTORS)) for path in (VECTORS / "model").rglob("*.*")}
    assert files == made[1].keys()
    for path, content in made[1].items():
        stored = File(path).load()
        if path.endswith(".json"):
            assert stored == content
        else:
            assert stored.keys() == content.keys()
            assert all(np.array_equal(stored[name], x.astype(np.float64)) for name, x in content.items()), path


def test_all_is_two_megabytes_at_most():
    sizes = [path.stat().st_size for path in VECTORS.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) <= 2_000_000


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.py")), ids=lambda path: path.name)
def test_only_its_adapter_imports_isadca_and_the_oracle_needs_numpy_alone(path):
    modules = {name.split(".")[0] for name in imports(path)}
    assert ("isadca" in modules) == path.name.startswith("isadca_")
    if path.name.startswith("numpy_"):
        beside = {other.stem for other in VECTORS.glob("numpy_*.py")}
        assert modules - beside <= {"math", "numpy", "unicodedata"}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


# ---- the specification -----------------------------------------------------------------------------------------

@lru_cache
def signatures() -> dict[str, list[str]]:
    """Functions that README.md specifies: in a table's first column or in bold, with their arguments."""
    found = re.findall(r"^(?:\| |\*\*)`(\w+)\(([^)]*)\)`", README, re.MULTILINE)
    return {name: [argument.split("=")[0].strip() for argument in arguments.split(",")] for name, arguments in found}


def test_the_specification_has_exactly_the_functions_of_the_vectors():
    assert signatures().keys() == CASES.keys()


@pytest.mark.parametrize("function", CASES)
def test_the_specification_has_the_vectors_arguments(function):
    for case in CASES[function]:
        assert set(case.arguments) <= set(signatures()[function])
    required = set.intersection(*(set(case.arguments) for case in CASES[function]))
    assert set(signatures()[function]) - required <= {"causal"}
    oracle = inspect.signature(getattr(numpy_isadca, function)).parameters
    assert list(oracle) == signatures()[function]


def test_the_specification_lists_the_thirteen_in_the_runners_words():
    table = README.split("## The mistakes that are known by name")[1]
    listed = re.findall(r"^\| (?!mistake|-)(.+?) \| (\w+) \|$", table, re.MULTILINE)
    assert listed == [(what, function) for what, (function, _) in wrong_adapter.THIRTEEN.items()]
    assert len(listed) == 13
