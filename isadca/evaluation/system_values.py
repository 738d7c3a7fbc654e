"""From what a user names to a System: a row of the table, a preset, a Method, a function, each with fields changed."""

from collections.abc import Callable
from dataclasses import fields, replace

from ..common.problem import Problem
from ..methods import ISADCA, PRESETS, Method
from .systems import SYSTEMS, System


def system_of(value: str | Method | Callable | System) -> System:
    """A name of SYSTEMS or of a preset (at the paper's guidance); a Method; or a function Controls -> Attend, which
    becomes the default method's `mix`. Raises Problem for an unknown name."""
    if isinstance(value, System):
        return value
    if isinstance(value, Method):
        return System(value.name, value.name, value)
    if callable(value):
        return System(value.__name__, value.__name__, replace(ISADCA, name=value.__name__, mix=value))
    if value in SYSTEMS:
        return SYSTEMS[value]
    if value not in PRESETS:
        others = [preset for preset in PRESETS if preset not in SYSTEMS]
        raise Problem(f"system is {value!r}, expected one of {', '.join([*SYSTEMS, *others])}")
    return System(value, value, replace(PRESETS[value], guidance=7.0))


def fingerprint(system: System) -> str:
    """All that says what a system does, apart from the package's code: the values of its method."""
    if not isinstance(system.method, Method):
        return system.name
    return " ".join(f"{field.name}={getattr(system.method, field.name)!r}" for field in fields(Method)
                    if field.name not in ("name", "source"))
