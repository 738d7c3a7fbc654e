"""isadca evaluate: from flags to evaluation.run.evaluate. `--systems isadca,rival:guidance=5,mine.py:idea` is read
here: names and own code, each with fields changed."""

import re
import sys
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common.problem import Problem
from ..evaluation.processes import own_device
from ..evaluation.run import evaluate as make_and_measure
from ..evaluation.systems import System, system_of
from ..loading.load import load
from ..methods import Method
from .console import note
from .flags import parse_lam, parse_layers
from .own_code import as_method, is_own, load_own

KNOBS = {field.name: field for field in fields(Method) if "help" in field.metadata}
PARSERS = {"lam": parse_lam, "layers": parse_layers, "ip_layers": parse_layers}


def evaluate(args: Namespace) -> None:
    model = load(args.weights, args.ip_adapter, args.image_encoder, args.vae, own_device(args.device), args.dtype)
    systems = parse_systems(args.systems) if args.systems else None
    results = make_and_measure(args.pairs, systems, args.metrics, args.out, model, args.weights, args.seeds, args.steps,
                               lambda items, label: tqdm(items, desc=label, disable=args.quiet, file=sys.stderr), note)
    for path in results.files:
        print(path)


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
