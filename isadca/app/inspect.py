"""isadca inspect: what a file is, for every kind that isadca reads or writes. isadca methods: the presets."""

import json
from argparse import Namespace
from dataclasses import fields
from math import prod
from pathlib import Path
from textwrap import fill

from ..common.problem import Problem
from ..methods import PRESETS


def inspect(args: Namespace) -> None:
    """One line per part; the first Problem is raised after the paths before it are printed."""
    for path in args.paths:
        if path.suffix.lower() == ".png":
            _picture(path)
        elif (path / "settings.json").is_file():
            _results(path)
        elif path.suffix == ".safetensors" and _is_reference(path):
            _reference(path)
        else:
            _weights(path)


def _picture(path: Path) -> None:
    from .recipe import read_recipe, typed_again
    recipe = read_recipe(path)
    print(f"{path}: {typed_again(recipe, path) if recipe.get('command') == 'vary' else recipe.get('command')}")
    for what in ("reference_sha256", "device", "dtype", "threads", "versions", "weights_sha256"):
        print(f"    {what}: {json.dumps(recipe.get(what))}")


def _results(path: Path) -> None:
    made = len(list(path.glob("pictures/*/*-*.png")))
    try:
        settings = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        lines = [f"    {name}: {json.dumps(value)}" for name, value in settings.items()]
    except (OSError, ValueError, AttributeError, RecursionError):
        raise Problem(f"{path}/settings.json: is damaged; a new run with another -o makes one") from None
    print(f"{path}: results of isadca evaluate, {made} variations", *lines, sep="\n")


def _is_reference(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format")).startswith("isadca reference")
    except (OSError, SafetensorError):
        return False  # the weights' reader says why


def _reference(path: Path) -> None:
    from .saved_reference import load_reference
    ref = load_reference(path, None)
    print(f"{path}: a saved reference, {ref.image.width}×{ref.image.height}, {ref.steps} steps, prompt {ref.prompt!r}")


def _weights(path: Path) -> None:
    from ..loading.inspect import parts_of
    for part in parts_of(path):
        count = sum(prod(shape) for shape in part.shapes.values())
        dtypes = "/".join(sorted({tensor.dtype for tensor in part.tensors.values()}))
        size = sum(file.stat().st_size for file in part.files)
        print(f"{part.path}: {part.kind}, layout {part.layout}, {len(part.shapes)} tensors, "
              f"{count / 1e6:.1f} M parameters, {dtypes}, {size / 1e6:.1f} MB; loads")


def methods(args: Namespace) -> None:
    for method in PRESETS.values():
        print(f"{method.name}: {method.source}")
        values = [f"{f.name}={getattr(method, f.name)}" for f in fields(method) if f.name not in ("name", "source")]
        print(fill(", ".join(values), 100, initial_indent="    ", subsequent_indent="    "))
