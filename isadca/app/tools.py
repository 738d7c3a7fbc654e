"""The commands around the method: evaluate, inspect, check, methods, fetch, convert."""

import sys
from argparse import Namespace
from dataclasses import fields
from math import prod
from textwrap import fill
from time import perf_counter

from PIL import ImageChops
from tqdm import tqdm

from ..common.images import load_image, save_png
from ..common.problem import Problem
from ..evaluation.evaluate import evaluate as run_evaluation
from ..evaluation.processes import own_device
from ..loading.inspect import parts_of
from ..loading.load import default_weights, load
from ..loop import Run, decode, sample
from ..methods import PRESETS
from ..reference import invert
from . import fetch as fetching
from .commands import note, writable
from .convert import convert as convert_file
from .recipe import hash_files, make_recipe, read_recipe
from .systems_flag import parse_systems

CLOSE, CLOSE_ELSEWHERE = 1, 16  # grey levels; on CPUs float32 gave 0 (float64 too), float16 1, bfloat16 6


def evaluate(args: Namespace) -> None:
    model = load(args.weights, args.ip_adapter, args.image_encoder, args.vae, own_device(args.device), args.dtype)
    seeds = tuple(_number("--seeds", text) for text in args.seeds.split(","))
    systems = parse_systems(args.systems) if args.systems else None
    metrics = args.metrics.split(",") if args.metrics else None
    results = run_evaluation(args.pairs, systems, metrics, args.out, model, args.weights, seeds, args.steps,
                             lambda items, label: tqdm(items, desc=label, disable=args.quiet, file=sys.stderr), note)
    for path in results.files:
        print(path)


def inspect(args: Namespace) -> None:
    """One line a part; raises the first Problem after the paths before it were printed."""
    for path in args.paths:
        for part in parts_of(path):
            count = sum(prod(shape) for shape in part.shapes.values())
            dtypes = "/".join(sorted({tensor.dtype for tensor in part.tensors.values()}))
            size = sum(file.stat().st_size for file in part.files)
            print(f"{part.path}: {part.kind}, layout {part.layout}, {len(part.shapes)} tensors, "
                  f"{count / 1e6:.1f} M parameters, {dtypes}, {size / 1e6:.1f} MB; loads")


def check(args: Namespace) -> None:
    """The demo's cat as a lemon, in few steps, against the stored picture; see CLOSE."""
    start, folder = perf_counter(), default_weights()
    stored, cat = folder / "check.png", folder / "references" / "cat.png"
    model = load(device=args.device, dtype=args.dtype)
    hashes = hash_files(model.files).result()
    [picture] = decode(model, sample(model, invert(model, load_image(cat), steps=10), [Run("a lemon")])[0])
    where = str(model.device), str(model.dtype).removeprefix("torch.")
    if args.renew:
        save_png(picture, stored, make_recipe({"command": "check"}, cat, hashes, *where))
        return print(stored)
    if read_recipe(stored).get("weights_sha256") != hashes:
        raise Problem(f"{stored}: was made with other demo weights; install isadca anew, or after training: "
                      "isadca check --renew")
    apart = max(high for _, high in ImageChops.difference(picture, load_image(stored)).getextrema())
    close = CLOSE if where == ("cpu", "float32") else CLOSE_ELSEWHERE
    found = f"{apart} grey levels from {stored} at most, {close} allowed on {' in '.join(where)}"
    if apart > close:
        raise Problem(f"another picture: {found}; try --device cpu --dtype fp32, or another version of torch")
    print(f"OK: {found}; {perf_counter() - start:.0f} s")


def methods(args: Namespace) -> None:
    for method in PRESETS.values():
        print(f"{method.name}: {method.source}")
        values = [f"{f.name}={getattr(method, f.name)}" for f in fields(method) if f.name not in ("name", "source")]
        print(fill(", ".join(values), 100, initial_indent="    ", subsequent_indent="    "))


def fetch(args: Namespace) -> None:
    items = fetching.wanted(args.names)
    absent = fetching.missing(items, args.to)
    note(f"{len(items) - len(absent)} of {len(items)} files are there and verified; "
         f"to download: {sum(item.size for item in absent) / 1e9:.2f} GB")
    for item in items:
        if item in absent:
            fetching.fetch(item, args.to)
        print(item.target(args.to))
    for what, files in [("verified by size alone, no checksum is known", [i.file for i in items if i.sha256 == "-"]),
                        ("from the branch main, no commit is known", [i.file for i in items if i.revision == "main"])]:
        if files:
            note(f"{what}: {', '.join(files)}")
    for step in fetching.next_steps(items, args.to):
        note(f"next: {step}")


def convert(args: Namespace) -> None:
    left_out = convert_file(args.source, writable(args.out, ".safetensors"))
    if left_out:
        note(f"{len(left_out)} left out, no tensors or not the adapter's: {', '.join(left_out[:3])}"
             + (", ..." if len(left_out) > 3 else ""))
    print(args.out)


def _number(flag: str, text: str) -> int:
    if not (text.isascii() and text.strip().isdigit() and len(text) < 20):
        raise Problem(f"{flag} has {text!r}, expected whole numbers such as 0,1,2")
    return int(text)
