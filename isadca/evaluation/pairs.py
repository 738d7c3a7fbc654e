"""Pairs of a reference and a prompt: from a CSV or JSON file, or from DreamBooth's dataset."""

import ast
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..common.images import load_image
from ..common.problem import Problem

LIVE = ("cat", "dog")  # DreamBooth's classes with prompts of their own
LISTS = ("pairs.csv", "pairs.json", "prompts_and_classes.txt", "dataset/prompts_and_classes.txt")


class Pair(NamedTuple):
    reference: Path
    prompt: str


def read_pairs(source: str | Path | Sequence[tuple[str | Path, str]]) -> list[Pair]:
    """Pairs from a CSV (columns reference, prompt) or JSON file (a list of such objects), from pairs.csv or pairs.json
    in a folder, from DreamBooth's dataset folder, or from a list. References are relative to the file. Raises Problem.
    """
    if isinstance(source, (str, Path)):
        source = _locate(Path(source))
        pairs = _parse(source)
    else:
        pairs = [Pair(Path(reference), prompt) for reference, prompt in source]
    if not pairs:
        raise Problem(f"{source}: holds no pairs; expected lines of reference,prompt")
    for reference in dict.fromkeys(pair.reference for pair in pairs):
        load_image(reference)  # a bad one is named now, not after hours
    return pairs


def _locate(path: Path) -> Path:
    if path.is_dir():
        for name in LISTS:
            if (path / name).is_file():
                return path / name
        raise Problem(f"{path}: has no pairs.csv, no pairs.json and no prompts_and_classes.txt (DreamBooth's); write "
                      "a pairs.csv with the columns reference,prompt")
    if not path.is_file():  # a pipe would never end
        raise Problem(f"{path}: no such file; PAIRS is a pairs.csv, a pairs.json, or the folder of one")
    return path


def _parse(path: Path) -> list[Pair]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.name == "prompts_and_classes.txt":
            return _dreambooth(text, path.parent)
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(io.StringIO(text)))
        pairs = [Pair(path.parent / row["reference"], row["prompt"].strip()) for row in rows]
        for pair in pairs:
            pair.prompt.encode()  # half of a surrogate pair is no text
        return pairs
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); PAIRS is such a file, or its folder") from None
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, csv.Error, RecursionError) as error:
        raise Problem(f"{path}: not a list of pairs ({str(error)[:80]}); expected the columns "
                      "reference,prompt") from None


def _dreambooth(text: str, folder: Path) -> list[Pair]:
    """Each subject's first picture with the 25 prompts of its kind; google/dreambooth, dataset/. The token that would
    name the subject is left out: no model here has learned one."""
    listed, *lists = text.partition("subject_name,class\n")[2].split("prompt_list = [")
    classes = dict(line.split(",") for line in listed.splitlines() if "," in line)
    objects, live = ([ast.literal_eval(line.partition(".format")[0]) for line in block.splitlines()
                      if ".format" in line] for block in lists)
    return [Pair(min((folder / subject).glob("*.jpg"), default=folder / subject / "00.jpg"),
                 " ".join(prompt.format("", kind).split()))
            for subject, kind in classes.items() for prompt in (live if kind in LIVE else objects)]
