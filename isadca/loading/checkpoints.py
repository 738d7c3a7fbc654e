"""Published weight files: read the header, recognise what it holds, fill a network strictly. Only safetensors is read.
Why a file does not load is said in diagnose.py."""

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..common.problem import Problem
from .layouts import FLOATS, HALVES, IGNORED, PLAIN, PREFIXES, Header, Layout, Part, Stored, same_shape

Network = TypeVar("Network", bound=nn.Module)


def read_header(path: str | Path) -> Header:
    """What a safetensors file holds, or the files that an index.json lists. No data is read. Raises Problem."""
    path = Path(path)
    if path.suffix == ".json":
        from .sharded import read_index
        return read_index(path, read_header)
    try:
        if not path.is_file():
            raise FileNotFoundError
        check_header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for key in file.keys():
                stored = file.get_slice(key)
                tensors[key] = Stored(key, path, tuple(stored.get_shape()), stored.get_dtype())
            return Header(path, tensors, file.metadata() or {})
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        from .diagnose import unreadable
        raise unreadable(path, error) from None


def check_header(path: Path) -> None:
    """Raises SafetensorError for a header that is longer than any model's: to read it would fill the memory."""
    with open(path, "rb") as file:
        if (length := int.from_bytes(file.read(8), "little")) > 2**24:  # published ones have a hundredth
            raise SafetensorError(f"a header of {length} bytes")


def recognise(path: str | Path) -> dict[str, Part]:
    """The networks that a file holds, by kind. Raises Problem for a file that holds none."""
    header = read_header(path)
    layouts = PLAIN
    if any(key.startswith(PREFIXES) for key in header.tensors) or not any(x.mark in header.tensors for x in PLAIN):
        from .original import ORIGINAL
        layouts = ORIGINAL + PLAIN
    parts: dict[str, Part] = {}
    for layout in layouts:
        if layout.mark in header.tensors and layout.kind not in parts:
            parts[layout.kind] = take(layout, header)
    if not parts:
        from .diagnose import unknown
        raise unknown(header)
    if "unet" in parts and (layouts is not PLAIN or header.metadata.keys() - {"format"}):
        from .original import check_prediction
        check_prediction(header)
    return parts


def take(layout: Layout, header: Header) -> Part:
    """The tensors of one layout, by our names."""
    own, others = re.compile(HALVES.get(layout.kind, "")), () if layout.prefix else PREFIXES
    tensors = {}
    for key, stored in header.tensors.items():
        ours = key.removeprefix(layout.prefix)
        belongs = key.startswith(layout.prefix) and not key.startswith(others)
        if belongs and own.match(ours) and not re.search(IGNORED, ours):
            tensors[rename(ours, layout.rules)] = stored
    return Part(layout.kind, layout.name, header, tensors)


def rename(key: str, rules: list) -> str:
    """One key through an ordered table of (pattern, replacement)."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


class _NoValues(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None  # no layer uses what an initialiser returns
        return function(*args, **kwargs or {})


@contextmanager
def without_values():
    """Networks built inside have shapes but no values; weights are loaded into them.

    The meta device alone would do, but torch imports its compiler to "draw" a meta tensor's initial values: 800
    modules, 1.4 s of a cold start.
    """
    with torch.device("meta"), _NoValues():
        yield


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def check_names(expected: dict[str, tuple[int, ...]], part: Part) -> None:
    """Every name and shape must be the expected one, every dtype a float. Raises one Problem for all that are not."""
    fits = expected.keys() == part.tensors.keys() and all(
        same_shape(stored.shape, expected[key]) and stored.dtype in FLOATS for key, stored in part.tensors.items())
    if not fits:
        from .diagnose import mismatch
        raise mismatch(expected, part)


def load_into(network: Network, part: Part, dtype: torch.dtype, device: torch.device | str = "cpu") -> Network:
    """Give a network built on the meta device the tensors of `part`; every name and shape must fit.

    fp32 on a CPU stays memory-mapped: nothing is copied. Returns the network in eval mode, without gradients on its
    weights (gradients still flow through it).
    """
    expected, state = shapes_of(network), dict[str, Tensor]()
    check_names(expected, part)
    for path in part.files:
        with safe_open(path, framework="pt") as file:
            state |= {ours: file.get_tensor(stored.name).reshape(expected[ours]).to(device=device, dtype=dtype)
                      for ours, stored in part.tensors.items() if stored.file == path}
    for key, tensor in state.items():  # the only weights whose NaN a CPU's attention hides: it drops such scores
        if key.endswith("to_k_ip.weight") and not tensor.isfinite().all():
            raise Problem(f"{part.path}: holds inf or NaN in {key}; download it again")
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)
