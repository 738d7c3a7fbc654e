"""From what a user names to a System: a row of the table, a preset, a Method, a function, each with fields changed."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from inspect import getfile, isfunction
from pathlib import Path

from ..common.files import sha256
from ..common.problem import Problem
from ..methods import ISADCA, PRESETS, Method
from .systems import SYSTEMS, System


def system_of(value: str | Method | Callable | System) -> System:
    """A name of SYSTEMS or of a preset (at the paper's guidance); a Method; or a function Controls -> Attend, which
    becomes the default method's `mix`. Raises Problem for what is none of them."""
    if isinstance(value, System):
        return value
    if isinstance(value, Method):
        return _of_method(value)
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return System(name, name, replace(ISADCA, name=name, mix=value))
    if value in SYSTEMS:
        return SYSTEMS[value]
    if value not in PRESETS:
        others = [preset for preset in PRESETS if preset not in SYSTEMS]
        raise Problem(f"system is {value!r}, expected one of {', '.join([*SYSTEMS, *others])}")
    return System(value, value, replace(PRESETS[value], guidance=7.0))


def _of_method(method: Method) -> System:
    """A preset with other values is called by what differs, such as isadca:lam=0.3."""
    if method.name not in PRESETS:
        return System(method.name, method.name, method)
    known = system_of(method.name)
    differs = [f"{field.name}={getattr(method, field.name)}" for field in fields(Method)
               if field.name != "source" and getattr(method, field.name) != getattr(known.method, field.name)]
    name = f"{method.name}:{':'.join(differs)}"
    return System(name, name, method) if differs else known


def system_fingerprint(system: System) -> str:
    """What a system does, apart from the package's code: the values of its method, and the user's own code."""
    if not isinstance(system.method, Method):
        return system.name
    values = {field.name: getattr(system.method, field.name) for field in fields(Method)
              if field.name not in ("name", "source")}
    own = {name: value for name, value in values.items() if callable(value) and not is_dataclass(value)}
    code = system.code or [_code_of(function) for function in own.values()]
    return repr([(name, value) for name, value in values.items() if name not in own] + [list(own), code])


def _code_of(function: Callable) -> tuple:
    """What tells a function from another: its source file, its name, and what it closes over."""
    maker = function if isfunction(function) else type(function)
    try:
        source = sha256(Path(getfile(maker)))
    except (TypeError, OSError):  # typed in a notebook, or not Python: never taken for an earlier one
        source = object.__repr__(function)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    plain = (bool, int, float, str, type(None))
    return source, maker.__qualname__, [x if isinstance(x, plain) else object.__repr__(x) for x in cells]
