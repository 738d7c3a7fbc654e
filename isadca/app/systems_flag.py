"""`--systems isadca,rival:guidance=5:init=inverted,mine.py:idea`: names and own code, each with fields changed."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..common.problem import Problem
from ..evaluation.systems import System, system_of
from ..methods import Method
from .flags import parse_lam, parse_layers
from .own_code import is_own, load_own
from .own_method import as_method

KNOBS = {field.name: field for field in fields(Method) if "help" in field.metadata}
PARSERS = {"lam": parse_lam, "layers": parse_layers, "ip_layers": parse_layers}


def parse_systems(text: str) -> list[System]:
    """The systems of the flag's value, in order. Raises Problem."""
    return [_parse(part.strip()) for part in text.split(",")]


def _parse(text: str) -> System:
    base, changes = re.fullmatch(r"(.*\.py:\w*|[^:]*)(?::(.*))?", text, re.DOTALL).groups()
    system = _own(base) if is_own(base) else system_of(base)
    if changes is None:
        return system
    if not isinstance(system.method, Method):
        raise Problem(f"--systems has {text!r}, but {base} is not a method of the loop and has no fields to change")
    values = dict(_field(change, text) for change in re.split(r":(?=[\w-]+=)", changes))
    return System(text, Path(text).name, replace(system.method, **values), code=system.code)


def _own(where: str) -> System:
    """FILE.py:NAME, which is a System, a Method or a function Controls -> Attend."""
    value, digest = load_own(where, "--systems")
    if isinstance(value, System):
        return replace(value, code=digest)
    return System(where, Path(where).name, as_method(value, where), code=digest)


def _field(change: str, text: str) -> tuple[str, Any]:
    name, _, value = change.partition("=")
    name = name.strip().replace("-", "_")
    if name not in KNOBS:
        raise Problem(f"--systems has {text!r}, expected NAME:FIELD=VALUE:FIELD=VALUE, the fields being "
                      f"{', '.join(KNOBS)}")
    try:
        parse: Any = PARSERS.get(name, type(KNOBS[name].default))
        return name, parse(value)
    except Problem:
        raise
    except Exception:  # int's, float's and argparse's
        raise Problem(f"--systems has {change!r}, expected such as {name}={KNOBS[name].default}") from None
