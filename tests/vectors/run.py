"""Test an implementation against the vectors: python tests/vectors/run.py MODULE

MODULE is the name of a Python module, or the path of a .py file, that offers any of the functions of README.md. It
needs NumPy and safetensors. Exit code 1 when a vector fails.
"""

import argparse
import importlib
import importlib.util
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np

from cases import ERROR, Case, File, distance, read_all

SINGLE = {"algorithm1": 1e-3}  # --float32: largest difference by the result's largest element
SINGLE_ELSEWHERE = 1e-4
load = lru_cache(File.load)


class Outcome(NamedTuple):
    case: Case
    verdict: str      # "pass", "fail" or "not offered"
    reason: str = ""


def import_module(name: str):
    """A module by its name, or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    sys.path.insert(0, str(path.parent))  # for what lies beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(value, single: bool):
    """An argument as the function gets it: files read, and under --float32 every float64 array rounded."""
    if isinstance(value, File):
        return prepared(load(value), single)
    if isinstance(value, dict):
        return {key: prepared(inner, single) for key, inner in value.items()}
    if single and isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value.astype(np.float32)
    return value


def as_float64(result):
    if isinstance(result, dict):
        return {key: as_float64(value) for key, value in result.items()}
    return np.asarray(result, np.float64)


def size(value) -> float:
    if isinstance(value, dict):
        return max(map(size, value.values()))
    return float(np.abs(value).max(initial=1.0))


def tolerance_of(case: Case, single: bool) -> float:
    if single and not isinstance(case.expected, str):
        return max(case.tolerance, SINGLE.get(case.function, SINGLE_ELSEWHERE) * size(case.expected))
    return case.tolerance


def check(module, case: Case, single: bool = False) -> Outcome:
    """Call the module's function for one case and judge what it gives."""
    function = getattr(module, case.function, None)
    if function is None:
        return Outcome(case, "not offered")
    try:
        result = as_float64(function(**{key: prepared(value, single) for key, value in case.arguments.items()}))
    except NotImplementedError:
        return Outcome(case, "not offered")
    except Exception as error:  # whatever it is, it is what the user has to see
        if isinstance(case.expected, str) and case.expected == ERROR:
            return Outcome(case, "pass")
        return Outcome(case, "fail", f"raises {type(error).__name__}: {error}")
    return judge(case, result, tolerance_of(case, single))


def judge(case: Case, result, tolerance: float) -> Outcome:
    """Pass, or fail with the nearest of the known mistakes, if the result is as near to it as a right one is."""
    away = distance(result, case.expected)
    if away <= tolerance:
        return Outcome(case, "pass")
    near = {what: distance(result, wrong) for what, wrong in case.mistakes.items()}
    what = min(near, key=near.get, default=None)
    looks = f"; it looks like this: {what}" if what is not None and near[what] <= tolerance else ""
    return Outcome(case, "fail", f"{describe(result, case.expected, away)}{looks}"
                                 + ("" if looks else f"; allowed is {tolerance:.0e}"))


def describe(result, expected, away: float) -> str:
    if isinstance(expected, str):
        return "gives a result, has to raise an error"
    if away < np.inf:
        return f"off by {away:.1e}"
    if isinstance(expected, dict):
        return f"is not finite, or not these arrays: { {key: value.shape for key, value in expected.items()} }"
    shape = getattr(result, "shape", "a dict")
    return f"has the shape {shape}, expected {expected.shape}" if shape != expected.shape else "holds inf or NaN"


def report(outcomes: list[Outcome]) -> bool:
    """Print a line for each function, and one for each failure. Whether nothing failed."""
    by_function = defaultdict(list)
    for outcome in outcomes:
        by_function[outcome.case.function].append(outcome)
    for function, some in by_function.items():
        failed = [o for o in some if o.verdict == "fail"]
        done = [o for o in some if o.verdict == "pass"]
        left = len(some) - len(failed) - len(done)
        verdict = "fail" if failed else "pass" if done else "not offered"
        count = f"{len(done)} of {len(some)}" if done or failed else ""
        print(f"{function:22}{verdict:6} {count}".rstrip() + (f", {left} not offered" if count and left else ""))
        for outcome in failed:
            print(f"    {outcome.case.name}: {outcome.reason}")
    return not any(o.verdict == "fail" for o in outcomes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", metavar="MODULE", help="a module's name, or the path of a .py file")
    parser.add_argument("--only", metavar="FUNCTION", help="this function alone")
    parser.add_argument("--float32", action="store_true", help="for an implementation that computes in float32")
    args = parser.parse_args(arguments)
    module = import_module(args.module)
    cases = [case for case in read_all() if args.only in (None, case.function)]
    return 0 if report([check(module, case, args.float32) for case in cases]) else 1


if __name__ == "__main__":
    sys.exit(main())
