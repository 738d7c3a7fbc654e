"""Published key lists (tests/keys/*.tsv) as test data, and safetensors files made from them that take no disk space.

A safetensors file is an 8-byte header length, a JSON header, and the data. Its data region is made with truncate(),
so a file of 4 GB is sparse: every tensor reads as zeros.
"""

import json
import math
import struct
from pathlib import Path

import pytest

from isadca.common.problem import Problem

KEYS = Path(__file__).parent / "keys"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}

Listing = dict[str, tuple[str, tuple[int, ...]]]  # key -> (dtype, shape)


def listing(name: str) -> Listing:
    rows = [line.split("\t") for line in (KEYS / f"{name}.tsv").read_text().splitlines()[1:]]
    return {key: (dtype, tuple(json.loads(shape))) for key, dtype, shape in rows}


def ldm_pairs(part: str) -> dict[str, str]:
    """LDM key, prefix included -> diffusers key."""
    rows = [line.split("\t") for line in (KEYS / "map_ldm_to_diffusers.tsv").read_text().splitlines()]
    return {ldm: ours for kind, ldm, ours in rows if kind == part}


def cast(tensors: Listing, dtype: str) -> Listing:
    """The same keys with the floating-point tensors in `dtype`, as half-precision files are made."""
    return {key: (dtype if old.startswith(("F", "BF")) else old, shape) for key, (old, shape) in tensors.items()}


def renamed(tensors: Listing, old: str, new: str) -> Listing:
    """Keys that begin with `old` begin with `new` instead."""
    return {new + key.removeprefix(old) if key.startswith(old) else key: v for key, v in tensors.items()}


def only(tensors: Listing, prefix: str) -> Listing:
    """The keys under `prefix`, without it."""
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}


def write_sparse(path: Path, tensors: Listing, metadata: dict | None = None, residue: int | None = 0) -> Path:
    """A safetensors file of zeros. The data begins `residue` bytes past a multiple of 8; None: without padding,
    as old writers did it."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (0 if residue is None else (residue - len(text)) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def told(call, path: Path, *words: str) -> str:
    """The Problem that `call` raises: one line, which names the path first and contains the words."""
    with pytest.raises(Problem) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ")
    assert all(word in text for word in words), text
    return text
