"""The paper's Table 1 and Fig. 3 and 4 in one call: every system over pairs of a reference and a prompt.

What is in the results folder is not made again, so a run that was stopped goes on. Several processes (torchrun) take
the pairs in turn; what they write does not depend on their number.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image

from ..common.files import save_png, save_text, sha256
from ..common.images import fit, load_image
from ..common.problem import Problem
from ..common.progress import Progress, silent
from ..loading.load import default_weights, load
from ..networks.model import Model
from .judge import METRICS, Judge, metric_lacks
from .pairs import Pair, read_pairs
from .processes import join, own_device, wait_for_others
from .report import Results, about_run, write_results
from .results_folder import Item, check_apart, check_settings, code_sha256, file_name, text_sha256
from .systems import SYSTEMS, Draw, System, find_extra, lacks, make_draw, system_fingerprint, system_of

# what makes pictures and numbers: all but reports and results_folder
CODE = ("*.py", "common/*.py", "networks/*.py", "speed/*.py", "evaluation/[!r]*.py", "evaluation/run.py")


def evaluate(pairs: str | Path | Sequence[tuple[str | Path, str]], systems: Iterable | None = None,
             metrics: Iterable[str] | None = None, out: str | Path = "results", model: Model | None = None,
             weights: str | Path | None = None, seeds: tuple[int, ...] = (0,), steps: int | None = None,
             progress: Progress = silent, tell: Callable[[str], None] = lambda text: None) -> Results:
    """Make and measure every variation that `out` does not hold yet, and write the tables and grids there.

    `pairs`: a file or folder (see read_pairs), or a list of (reference, prompt). `systems`: names of SYSTEMS or of
    presets, Systems, Methods, or functions Controls -> Attend; if not given, all of SYSTEMS whose weights are there.
    `metrics` likewise. The weights that systems and metrics have of their own are looked for in `weights` and beside
    it. Without `steps` each system has its own number. `tell` receives notes. Raises Problem.
    """
    rank, ranks = join()
    weights, out, listed = Path(weights) if weights else default_weights(), Path(out), read_pairs(pairs)
    model = model or load(weights, device=own_device("auto"))
    if steps is not None:
        model.schedule.steps(steps)  # refuses a bad number before the work
    folder = find_extra(weights, "metrics") or weights / "metrics"
    if systems is None:
        systems = _available({name: lacks(system, model, weights) for name, system in SYSTEMS.items()}, tell)
    metrics = tuple(metrics or _available({name: metric_lacks(name, folder) for name in METRICS}, tell))
    chosen = distinct(map(system_of, systems))
    draws = {system: make_draw(system, model, weights, steps) for system in chosen}
    judge = Judge(metrics, folder, model.device)
    check_apart(out, [pair.reference for pair in listed] + ([Path(pairs)] if isinstance(pairs, (str, Path)) else []))
    check_settings(out, describe(model, listed, steps, ranks), hash_extras(weights, folder, chosen, metrics))
    items = list_items(listed, chosen, tuple(seeds))
    _make([item for item in items if item.index % ranks == rank], draws, judge, out, model.size, progress, tell)
    wait_for_others()
    if rank:  # the first process reports
        return Results([], {})
    return write_results(items, metrics, out, about_run(items, model, steps, weights))


def _available(lacking: dict[str, str], tell: Callable[[str], None]) -> list[str]:
    """Those that lack nothing; and a note on the others."""
    left_out = [f"{name} ({why})" for name, why in lacking.items() if why]
    if left_out:
        tell(f"left out: {', '.join(left_out)}; see weights/README.md")
    return [name for name, why in lacking.items() if not why]


def distinct(systems: Iterable[System]) -> list[System]:
    """Each once. Raises Problem where two would write the same files."""
    chosen = list(dict.fromkeys(systems))
    if len({file_name(system.name) for system in chosen}) < len(chosen):
        raise Problem("two systems have the same name in files; give a Method another name")
    return chosen


def list_items(pairs: list[Pair], systems: Iterable[System], seeds: tuple[int, ...]) -> list[Item]:
    """Pair by pair. A system that gives every seed the same picture makes one."""
    return [Item(i, pair, system, seed) for i, pair in enumerate(pairs) for system in systems
            for seed in (seeds[:1] if system.deterministic else seeds)]


def describe(model: Model, pairs: list[Pair], steps: int | None, ranks: int) -> dict[str, str | int]:
    """All that every picture depends on: a results folder begun with anything else is another experiment."""
    files = {pair.reference: sha256(pair.reference) for pair in pairs}
    networks = {kind: getattr(model, kind) for kind in ("unet", "vae", "text", "vision")}
    return {"pairs": text_sha256(repr([(files[pair.reference], pair.prompt) for pair in pairs])),
            "steps": steps or "own", "size": model.size, "dtype": str(model.dtype), "device": model.device.type,
            "ranks": ranks, "CPU threads": torch.get_num_threads() if model.device.type == "cpu" else 0,
            **{f"{kind} weights": sha256(path) for kind, path in model.files.items()},
            **{f"{kind} config": repr(net.config) for kind, net in networks.items() if net is not None},
            "scheduler": repr(model.schedule.config),
            "vocabulary": text_sha256(model.tokenizer._bpe.to_str())}


def hash_extras(weights: Path, metrics_folder: Path, systems: list[System], metrics: tuple[str, ...]) -> dict[str, str]:
    """sha256 of the weights, configs and vocabularies of the other systems and of the metrics."""
    found = [find_extra(weights, system.needs) for system in systems if system.needs]
    places = [place for place in found if place]
    places += [metrics_folder / file for name in metrics for file in METRICS[name][2]]
    files = {path for place in places for path in ([place] if place.is_file() else place.rglob("*"))}
    return {"/".join(path.parts[-3:]): sha256(path) for path in sorted(files)
            if path.suffix in (".safetensors", ".json", ".txt")}


def _make(items: list[Item], draws: dict[System, Draw], judge: Judge, out: Path, size: int, progress: Progress,
          tell: Callable[[str], None]) -> None:
    """Make and measure what is not there, was made by other code, or is damaged."""
    code = code_sha256(CODE)
    made_by = {item.system: text_sha256(code + system_fingerprint(item.system)) for item in items}
    stale = {item for item in items if item.load(out, size, made_by[item.system]) is None}
    todo = [item for item in items if item in stale or not {"seconds", *judge.names} <= item.numbers(out).keys()]
    if other := sum(item.picture(out).exists() for item in stale):
        tell(f"{other} of {len(items)} variations were made by other code or are damaged; they are made again")
    for item in progress(todo, f"variations ({len(items) - len(todo)} of {len(items)} there)"):
        original, path, digest = load_image(item.pair.reference), item.picture(out), made_by[item.system]
        reference, numbers = fit(original, (size, size)), item.numbers(out)
        variation = None if item in stale or "seconds" not in numbers else item.load(out, size, digest)
        if variation is None:
            began = time.perf_counter()
            variation = draws[item.system](original, item.pair.prompt, item.seed)
            numbers = {"seconds": time.perf_counter() - began}
            check_drawn(variation, size, item.system)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(reference, path.with_name("reference.png"))
            save_png(variation, path)
        numbers |= judge(variation, reference, item.pair.prompt)
        save_text(json.dumps({"made_by": digest} | numbers) + "\n", path.with_suffix(".json"))


def check_drawn(variation: object, size: int, system: System) -> None:
    """Raises Problem for what a system of the user's own should not draw."""
    expected, drawn = f"{size}×{size}", type(variation).__name__
    if isinstance(variation, Image.Image):
        drawn = f"{variation.width}×{variation.height}"
    if drawn != expected:
        raise Problem(f"{system.name}: drew {drawn}, expected a picture of {expected}")
