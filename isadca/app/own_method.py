"""The user's own code as a Method, and what its attention gives looked at while it runs."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from ..common.problem import Problem
from ..methods import Method
from .own_code import load_own


def own_method(where: str, flag: str = "--method") -> tuple[Method, str]:
    """FILE.py:NAME as a Method, and the sha256 of its code."""
    value, digest = load_own(where, flag)
    return as_method(value, where), digest


def as_method(value: Any, where: str) -> Method:
    """A Method, or a function Controls -> Attend as the `mix` of one; what its attention gives is checked each time."""
    method = value if isinstance(value, Method) else Method(where, mix=value, source="own code")
    if not callable(method.mix) and method is not value:
        raise Problem(f"{where}: is a {type(value).__name__}, expected a Method or a function Controls -> Attend")
    return replace(method, mix=checked(method.mix, where)) if callable(method.mix) else method


def checked(function: Callable, where: str) -> Callable:
    """A `mix` whose attention's results are checked: torch would silently broadcast a single row or query over all of
    them, and a NaN would be blamed on what comes after."""
    def mix(controls):
        made, look_at = function(controls), cache(partial(_looked_at, where=where))  # once for rows that share it
        if isinstance(made, list):
            return [row._replace(attend=look_at(row.attend)) for row in made]
        return tuple(map(look_at, made)) if isinstance(made, tuple) else look_at(made)
    return mix


def _looked_at(attend: Callable, where: str) -> Callable:
    if not callable(attend):
        raise Problem(f"{where}: returned {type(attend).__name__}, expected a function (q, k, v, site) -> y")

    def attend_own(q, k, v, site):
        y = attend(q, k, v, site)
        expected = (*q.shape[:3], v.shape[3])
        if getattr(y, "shape", None) != expected:
            given = tuple(y.shape) if hasattr(y, "shape") else f"a {type(y).__name__}"
            raise Problem(f"{where}: gave {given} at {site.name}, expected {expected}, the shape of q")
        if not y.isfinite().all():
            raise Problem(f"{where}: gave inf or NaN at {site.name}; look for a division or log of 0 in it")
        return y
    return attend_own
