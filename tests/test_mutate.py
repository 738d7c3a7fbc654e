"""The mutation check itself, without running it: what it changes, what runs the change, and where it looks."""

import ast
import importlib.util

import pytest
from conftest import ROOT
from house import PACKAGE, run_python
from mutants import each, mutated

SOURCE = '''"""A file."""
HALF = 0.5
Kind = tuple[int, str]


def f(x: int = 3, y=None) -> "int":
    """Not this."""
    if not x:
        raise ValueError("nor this", 7)
    return x - 1 if x < 10 else pow(x, y)
'''


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tests" / "mutate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_changed_and_what_is_not():
    found = [(mutant.line, mutant.what, mutant.function is None) for mutant in each(ast.parse(SOURCE))]
    assert found == [
        (2, "constant: 0.5 -> 0.85", True),
        (6, "constant: 3 -> 4", True), (6, "constant: 3 -> 2", True),
        (8, "condition: if not x: -> if x:", False),
        (10, "condition: x - 1 if x < 10 else pow(x, y) -> x - 1 if not x < 10 else pow(x, y)", False),
        (10, "comparison: x < 10 -> x <= 10", False),
        (10, "constant: 10 -> 11", False), (10, "constant: 10 -> 9", False),
        (10, "operator: x - 1 -> x + 1", False),
        (10, "constant: 1 -> 2", False), (10, "constant: 1 -> 0", False),
        (10, "argument order: pow(x, y) -> pow(y, x)", False)]


@pytest.mark.parametrize("code", [
    "max(a, b)", "x.transpose(a, b)", "torch.promote_types(a, b)", "isinstance(a, (B, C))", "x.mean((d, e))",
    "a in (b, c)", "KV = dict[str, tuple[A, B]]", "Kind = A | B"])
def test_orders_that_do_not_matter_and_types_are_not_changed(code):
    assert [mutant.what for mutant in each(ast.parse(code))
            if " order: " in mutant.what and "((B, C), a)" not in mutant.what] == []


@pytest.mark.parametrize("code", ["f(a, b)", "x.permute(a, b)", "f((a, b))", "x.view((a, b))", "LOW, HIGH = a, b"])
def test_other_orders_are_changed(code):
    assert len(list(each(ast.parse(code)))) == 1


def test_each_mutant_is_one_change_that_runs():
    mutants = list(each(ast.parse(SOURCE)))
    texts = {ast.unparse(mutated(SOURCE, mutant.number)) for mutant in mutants}
    assert len(texts) == len(mutants) and ast.unparse(ast.parse(SOURCE)) not in texts
    names = {}
    exec(compile(mutated(SOURCE, 8), "a file", "exec"), names)
    assert (names["f"](5), names["f"].__code__.co_firstlineno) == (6, 6)


def test_a_mutant_is_imported_in_the_place_of_its_module(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import mutate
known = mutate.Known("ddim.py")
[number] = [m.number for m in known.mutants if m.what == "constant: 0.012 -> 0.11800000000000001"]
sys.meta_path.insert(0, mutate.Mutated("ddim.py", number))
import inspect, isadca.ddim
print(isadca.ddim.ScheduleConfig().beta_end, inspect.getsource(isadca.ddim.step).startswith("def step"))"""
    assert run_python(code, tmp_path) == "0.11800000000000001 True\n"


def test_verdicts_hold_for_the_code_and_tests_that_they_were_found_with(mutate, tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "CACHE", tmp_path)
    known = mutate.Known("ddim.py")
    known.reach = {}
    known.write()
    for mutant, noticed in zip(known.mutants, [True, False, False]):
        known.add(mutant, noticed, 0.0)
    assert list(mutate.Known("ddim.py").verdicts) == [0, 1, 2]
    monkeypatch.setitem(mutate.TESTS, "ddim.py", ["heart/test_ddim.py"])   # other tests
    monkeypatch.setattr(mutate, "accepted", lambda: {known.row(known.mutants[2]): "a reason"})
    known = mutate.Known("ddim.py")
    assert known.verdicts == {} and known.reach is None
    known.keep_settled()
    assert list(known.verdicts) == [0, 2]
    known.code = "other code"
    known.write()
    known = mutate.Known("ddim.py")
    known.keep_settled()
    assert known.verdicts == {}


def test_a_mutant_meets_the_tests_that_reach_it(mutate):
    """What runs at import is met by every test, even one that reads only what was made then."""
    at_import, first, second, helper = (mutate.Mutant(0, line, "", function) for line, function in [
        (1, None), (6, (5, 7)), (9, (8, 9)), (12, (11, 12))])
    reach = {"a": (1.0, [6]), "b": (0.5, [6, 9]), "c": (2.0, [])}
    assert [mutate.met_by(mutant, reach) for mutant in (at_import, first, second, helper)] == [
        ["a", "b", "c"], ["a", "b"], ["b"], ["a", "b", "c"]]


def test_it_knows_the_lines_of_a_diff(mutate):
    diff = """--- a/isadca/ddim.py
+++ b/isadca/ddim.py
@@ -3 +3 @@ def f():
@@ -10,0 +11,2 @@
--- a/isadca/loop.py
+++ b/isadca/loop.py
@@ -5,2 +4,0 @@
"""
    assert mutate.lines_of_diff(diff) == {"ddim.py": {3, 11, 12}, "loop.py": set()}


def test_its_files_and_tests_exist_and_accepted_mutants_are_of_them(mutate):
    assert [file for file in mutate.TESTS if not (PACKAGE / file).is_file()] == []
    tests = {test for tests in mutate.TESTS.values() for test in tests}
    assert [test for test in tests if not (ROOT / "tests" / test).is_file()] == []
    assert {file for file, _, _ in mutate.accepted()} <= mutate.TESTS.keys()
