"""Published weight files: read the headers, recognise what they hold, fill a network strictly. Only safetensors is
read. What is wrong with a file that does not load is said in diagnose.py."""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..common.problem import Problem
from .config_json import check_prediction, read_json
from .layouts import CLIP_HALVES, IGNORED, LAYOUTS, Layout, rename

Network = TypeVar("Network", bound=nn.Module)
FLOATS = ("F16", "BF16", "F32", "F64")


class Stored(NamedTuple):
    """A tensor in a file: its name there, and what the header says of it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """One network's tensors, by our names. `path` is their file; of several, the index.json that lists them."""

    kind: str
    path: Path
    layout: str
    tensors: dict[str, Stored]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    @cached_property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> (shape, dtype) of a safetensors file, without reading the data. Raises Problem if it is not one."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        from .diagnose import unreadable
        raise unreadable(path, error) from None


def read_headers(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, or of the files that an index.json lists."""
    if path.suffix != ".json":
        return {key: Stored(key, path, *about) for key, about in read_header(path).items()}
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(name == Path(str(name)).name for name in listed.values()):
        raise Problem(f"{path}: has no weight_map from tensors to files beside it; download it again")
    headers = {name: read_header(path.parent / name) for name in set(listed.values())}
    lost = [key for key, name in listed.items() if key not in headers[name]]
    if lost:
        raise Problem(f"{path}: {lost[0]} is not in {listed[lost[0]]}, where it should be; download both again")
    return {key: Stored(key, path.parent / name, *headers[name][key]) for key, name in listed.items()}


def recognise(path: str | Path) -> list[Part]:
    """The parts that a safetensors file holds. Raises Problem for files that hold none."""
    path = Path(path)
    header = read_headers(path)
    parts: dict[str, Part] = {}
    for layout in LAYOUTS:
        if layout.mark in header and layout.part not in parts:
            parts[layout.part] = take(path, layout, header)
    if not parts:
        from .diagnose import stranger
        raise stranger(path, header) or AssertionError("a stranger is always named")
    check_prediction(path, header)
    return list(parts.values())


def take(path: Path, layout: Layout, header: dict[str, Stored]) -> Part:
    """The tensors of one layout, by our names."""
    own = re.compile(CLIP_HALVES.get(layout.part, ""))
    others = tuple(other.prefix for other in LAYOUTS if other.prefix and not layout.prefix)
    tensors = {}
    for key, stored in header.items():
        ours = key.removeprefix(layout.prefix)
        belongs = key.startswith(layout.prefix) and not key.startswith(others)
        if belongs and own.search(ours) and not re.search(IGNORED, ours):
            tensors[rename(ours, layout.rules)] = stored
    return Part(layout.part, path, layout.name, tensors)


class _NoValues(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None  # no layer uses what an initialiser returns
        return function(*args, **kwargs or {})


@contextmanager
def without_values():
    """Networks built inside have shapes but no values; weights are loaded into them.

    The meta device alone would do. But torch imports its compiler to "draw" a meta tensor's initial values: 800
    modules, 1.4 s of a cold start.
    """
    with torch.device("meta"), _NoValues():
        yield


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def check_names(expected: dict[str, tuple[int, ...]], part: Part) -> None:
    """Every name and shape must be the expected one, every type a float. Raises one Problem for all that are not."""
    fits = expected.keys() == part.shapes.keys() and all(
        same_shape(stored.shape, expected[key]) and stored.dtype in FLOATS for key, stored in part.tensors.items())
    if not fits:
        from .diagnose import mismatch
        raise mismatch(expected, part)


def same_shape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    return theirs == ours or theirs == ours + (1, 1)  # LDM keeps the VAE's linear layers as 1×1 convolutions


def load_into(model: Network, part: Part, dtype: torch.dtype, device: torch.device | str = "cpu") -> Network:
    """Give a model built on the meta device the tensors of `part`; every name and shape must fit.

    fp32 on CPU stays memory-mapped: nothing is copied. Returns the model in eval mode, without gradients on its
    weights (gradients still flow through it).
    """
    expected, state = shapes_of(model), dict[str, Tensor]()
    check_names(expected, part)
    for path in part.files:
        with safe_open(path, framework="pt") as file:
            state |= {ours: _fit(file.get_tensor(stored.name), expected[ours], dtype, device)
                      for ours, stored in part.tensors.items() if stored.file == path}
    for key, tensor in state.items():  # the only weights in which a CPU's attention hides it: it drops such scores
        if key.endswith("to_k_ip.weight") and not tensor.isfinite().all():
            raise Problem(f"{part.path}: holds inf or NaN in {key}; download it again")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _fit(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    return tensor.reshape(shape).to(device=device, dtype=dtype)
