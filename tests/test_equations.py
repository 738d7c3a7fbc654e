"""The paper's equations by number: one function claims each, a vector and a test hold it, and the pages list them."""

import subprocess
import sys

import pytest
from conftest import ROOT
from equations import ALGORITHM, PROOFS, TABLES, defines, function_of, imported, with_table
from house import cited, claims

sys.path.insert(0, str(ROOT / "tests" / "vectors"))

import isadca_adapter
import run
from cases import read_all

EACH_EQUATION = pytest.mark.parametrize("equation", PROOFS)


def test_each_equation_is_in_one_functions_docstring():
    """A reader with the paper open finds the function by searching for the number, and finds it once. Eq. 1 is the
    loss of a training that others did."""
    assert claims().keys() == {*range(2, 11), ALGORITHM} == PROOFS.keys()
    assert {equation: names for equation, names in claims().items() if len(names) != 1} == {}


def test_reading_of_equation_numbers():
    assert cited("Eq. 5: a; Eqs. 3 and 10, b (Eqs. 6-8), Eqs. 11, 12 and\n14") == {3, 5, 6, 7, 8, 10, 11, 12, 14}
    assert cited("Equality 5, eqs 7, seq. 3") == set()


@EACH_EQUATION
def test_each_equation_has_vectors_that_reach_its_function(equation, monkeypatch):
    """They pass, and do not where the function is broken."""
    named = PROOFS[equation].vectors
    cases = [case for case in read_all() if named.get(case.function) == case.name]
    assert len(cases) == len(named) > 0
    assert {run.check(isadca_adapter, case).verdict for case in cases} == {"pass"}
    monkeypatch.setattr(imported(function_of(equation)), "__code__", broken.__code__)
    assert {run.check(isadca_adapter, case).verdict for case in cases} == {"fail"}


def broken(*args, **kwargs):
    raise ArithmeticError("broken on purpose")


@EACH_EQUATION
def test_each_equation_has_a_test_that_exists(equation):
    assert defines(PROOFS[equation].test)


@pytest.mark.slow
@EACH_EQUATION
def test_each_equations_test_notices_when_its_function_is_broken(equation):
    code = f"""
import sys, pytest
sys.path.insert(0, "tests/oracles")
from equations import function_of, imported
def broken(*args, **kwargs):
    raise ArithmeticError("broken on purpose")
imported(function_of({equation!r})).__code__ = broken.__code__
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "tests/{PROOFS[equation].test}"]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "broken on purpose" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("page", TABLES)
def test_the_pages_have_the_table_that_the_script_writes(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert with_table(text, TABLES[page]()) == text, "run python tests/oracles/equations.py"
