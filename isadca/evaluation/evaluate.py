"""The paper's Table 1 and Fig. 3 and 4: every system over pairs of a reference and a prompt, measured and compared.

Each variation becomes RESULTS/pictures/PAIR/SYSTEM-SEED.png with its numbers beside it as JSON; what is there is not
made again, so a run that was stopped goes on. Several processes (torchrun) take the pairs in turn; what they write does
not depend on their number. report.py makes the tables and grids of what was written.
"""

import ast
import csv
import hashlib
import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from ..common.files import save_text, sha256
from ..common.images import fit, load_image, save_png
from ..common.problem import Problem
from ..common.progress import Progress, silent
from .scores import Scores
from .systems import Draw, one_picture

LIVE = ("cat", "dog")  # DreamBooth's classes with prompts of their own


class Pair(NamedTuple):
    reference: Path
    prompt: str


# ---- pairs -----------------------------------------------------------------------------------------------------

def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from a CSV (columns reference, prompt) or JSON file (a list of such objects), from pairs.csv or pairs.json
    in a folder, or from DreamBooth's dataset folder. References are relative to the file. Raises Problem."""
    path = Path(path)
    if path.is_dir():
        for name in ("pairs.csv", "pairs.json", "prompts_and_classes.txt", "dataset/prompts_and_classes.txt"):
            if (path / name).is_file():
                return read_pairs(path / name)
        raise Problem(f"{path}: has no pairs.csv, no pairs.json and no prompts_and_classes.txt (DreamBooth's); write "
                      "a pairs.csv with the columns reference,prompt")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.name == "prompts_and_classes.txt":
            pairs = _dreambooth(text, path.parent)
        else:
            rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
            pairs = [Pair(path.parent / row["reference"], row["prompt"].strip()) for row in rows]
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); PAIRS is such a file, or its folder") from None
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise Problem(f"{path}: not a list of pairs ({error}); expected the columns reference,prompt") from None
    if not pairs:
        raise Problem(f"{path}: holds no pairs; expected lines of reference,prompt")
    for reference in dict.fromkeys(pair.reference for pair in pairs):
        load_image(reference)  # a bad one is named now, not after hours
    return pairs


def _dreambooth(text: str, folder: Path) -> list[Pair]:
    """Each subject's first picture with the 25 prompts of its kind; google/dreambooth, dataset/. The token that would
    name the subject is left out: nothing here was taught one."""
    listed, *lists = text.partition("subject_name,class\n")[2].split("prompt_list = [")
    classes = dict(line.split(",") for line in listed.splitlines() if "," in line)
    objects, live = ([ast.literal_eval(line.partition(".format")[0]) for line in block.splitlines()
                      if ".format" in line] for block in lists)
    return [Pair(min((folder / subject).glob("*.jpg"), default=folder / subject / "00.jpg"),
                 " ".join(prompt.format("", kind).split()))
            for subject, kind in classes.items() for prompt in (live if kind in LIVE else objects)]


# ---- work ------------------------------------------------------------------------------------------------------

class Item(NamedTuple):
    """One variation to make and measure."""

    index: int  # of the pair
    pair: Pair
    system: str
    seed: int

    def picture(self, results: Path) -> Path:
        return results / "pictures" / f"{self.index:04d}" / f"{self.system}-{self.seed}.png"

    def numbers(self, results: Path) -> dict[str, float]:
        """What is known of it: its seconds and its scores; empty before it is made."""
        try:
            return json.loads(self.picture(results).with_suffix(".json").read_text())
        except (OSError, ValueError):
            return {}


def list_items(pairs: list[Pair], systems: Iterable[str], seeds: tuple[int, ...]) -> list[Item]:
    """Pair by pair. A system that gives every seed the same picture makes one."""
    return [Item(i, pair, system, seed) for i, pair in enumerate(pairs) for system in systems
            for seed in (seeds[:1] if one_picture(system) else seeds)]


def evaluate(items: list[Item], draws: dict[str, Draw], scores: Scores, results: Path, size: int,
             progress: Progress = silent) -> None:
    """Make and measure this process's share of the items: every RANKS-th pair."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    todo = [item for item in items if item.index % ranks == rank]
    done = [item for item in todo if set(scores.names) | {"seconds"} <= item.numbers(results).keys()]
    for item in progress([item for item in todo if item not in done], f"variations ({len(done)} of {len(todo)} there)"):
        reference = fit(load_image(item.pair.reference), size)
        path, numbers = item.picture(results), item.numbers(results)
        path.parent.mkdir(parents=True, exist_ok=True)
        if "seconds" in numbers and path.exists():
            variation = load_image(path)
        else:
            began = time.perf_counter()
            variation = draws[item.system](reference, item.pair.prompt, item.seed)
            numbers = {"seconds": time.perf_counter() - began}
            save_png(reference, path.with_name("reference.png"))
            save_png(variation, path)
        numbers |= scores(variation, reference, item.pair.prompt)
        save_text(json.dumps(numbers) + "\n", path.with_suffix(".json"))


def check_settings(results: Path, pairs: list[Pair], steps: int, size: int, weights: dict[str, str]) -> None:
    """A results folder holds one experiment. Raises Problem where it was begun with other pairs, steps or weights."""
    files = {pair.reference: sha256(pair.reference) for pair in pairs}
    listed = json.dumps([(files[pair.reference], pair.prompt) for pair in pairs])
    settings = {"pairs": hashlib.sha256(listed.encode()).hexdigest(), "steps": steps, "size": size, **weights}
    path = results / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        other = [key for key in settings if before.get(key, settings[key]) != settings[key]]
        if other:
            raise Problem(f"{results}: was begun with other {', '.join(other)}; choose another -o for a new experiment")
        settings = before | settings
    save_text(json.dumps(settings, indent=1) + "\n", path)


def own_device(name: str) -> str:
    """Under torchrun each process has a GPU of its own."""
    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own and name in ("auto", "cuda") and torch.cuda.is_available() else name


def meet() -> bool:
    """Under torchrun, wait for the other processes. Whether this one is to report."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # the slowest share is waited for
        torch.distributed.barrier()
    return int(os.environ.get("RANK", 0)) == 0
