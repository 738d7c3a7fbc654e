"""isadca evaluate: from flags to evaluation's evaluate."""

import sys
from argparse import Namespace

from tqdm import tqdm

from ..common.problem import Problem
from ..evaluation.run import evaluate as make_and_measure
from ..evaluation.processes import own_device
from ..loading.load import load
from .console import note
from .systems_flag import parse_systems


def evaluate(args: Namespace) -> None:
    model = load(args.weights, args.ip_adapter, args.image_encoder, args.vae, own_device(args.device), args.dtype)
    seeds = tuple(_seed(text) for text in args.seeds.split(","))
    systems = parse_systems(args.systems) if args.systems else None
    metrics = args.metrics.split(",") if args.metrics else None
    results = make_and_measure(args.pairs, systems, metrics, args.out, model, args.weights, seeds, args.steps,
                               lambda items, label: tqdm(items, desc=label, disable=args.quiet, file=sys.stderr), note)
    for path in results.files:
        print(path)


def _seed(text: str) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and len(text) < 19):
        raise Problem(f"--seeds has {text!r}, expected whole numbers such as 0,1,2")
    return int(text)
