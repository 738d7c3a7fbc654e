"""Published weight files: read the headers, recognise what they hold, fill a network strictly. Only safetensors is
read. What is wrong with a file that does not load is said in diagnose.py."""

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..common.problem import Problem
from .config_json import check_prediction
from .headers import FLOATS, Part, Stored, read_headers, same_shape
from .layouts import CLIP_HALVES, IGNORED, LAYOUTS, Layout, rename

Network = TypeVar("Network", bound=nn.Module)


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


def load_into(model: Network, part: Part, dtype: torch.dtype, device: torch.device | str = "cpu") -> Network:
    """Give a model built on the meta device the tensors of `part`; every name and shape must fit.

    fp32 on CPU stays memory-mapped: nothing is copied. Returns the model in eval mode, without gradients on its
    weights (gradients still flow through it).
    """
    expected, state = shapes_of(model), dict[str, Tensor]()
    check_names(expected, part)
    for path in part.files:
        with safe_open(path, framework="pt") as file:
            state |= {ours: file.get_tensor(stored.name).reshape(expected[ours]).to(device=device, dtype=dtype)
                      for ours, stored in part.tensors.items() if stored.file == path}
    for key, tensor in state.items():  # the only weights in which a CPU's attention hides it: it drops such scores
        if key.endswith("to_k_ip.weight") and not tensor.isfinite().all():
            raise Problem(f"{part.path}: holds inf or NaN in {key}; download it again")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
