"""PyTorch's pickles (.bin, .pth, .ckpt) to safetensors, once, on request: the only place that unpickles.

weights_only refuses code, though PyTorch before 2.6 could still be made to run some (CVE-2025-32434).
"""

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.files import atomic_write
from ..common.problem import Problem
from ..loading.checkpoints import read_header

# an IP-Adapter's training checkpoint; where accelerate stored shared tensors once, adapter_modules are in the UNet
TRAINED = [(r"^image_proj_model\.", "image_proj."), (r"^adapter_modules\.(\d+)\.", r"ip_adapter.\1.")]
IN_UNET = re.compile(r"^unet\.(.+)\.attn2\.processor\.(to_[kv]_ip\.weight)$")


def convert(source: Path, out: Path) -> list[str]:
    """Write the tensors of `source`, in their dtypes, under the published names. Returns the keys left out.

    Unwraps "state_dict", joins nested dicts with dots, and makes an IP-Adapter of its training checkpoint (which may
    be a safetensors file). Raises Problem for files that hold anything but tensors, or no tensors.
    """
    found = dict(_flatten(read(source)))
    tensors = published({key: value for key, value in found.items() if isinstance(value, Tensor)})
    if not tensors:
        raise Problem(f"{source}: holds no tensors; nothing to convert")
    if source.suffix == ".safetensors" and tensors.keys() == found.keys():
        raise Problem(f"{source}: is in safetensors already, under names that are not a training checkpoint's; use it")
    try:
        with atomic_write(out) as temporary:
            save_file(_apart(tensors), temporary, {"format": "pt"})
    except (SafetensorError, ValueError, RuntimeError) as error:  # a full disk, a sparse tensor
        raise Problem(f"{source}: cannot be written to {out} ({str(error).splitlines()[0]})") from None
    return sorted(key for key, value in found.items() if not any(value is tensor for tensor in tensors.values()))


def read(source: Path) -> Mapping:
    """The dict in a file that torch.save wrote, nothing but tensors and plain values in it. Raises Problem."""
    if not source.is_file():
        raise Problem(f"{source}: no such file; check the path")
    if source.suffix == ".safetensors":
        read_header(source)  # explains what is wrong
        return load_file(source)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise Problem(f"torch {torch.__version__} is too old to open pickles safely; install 2.10 or newer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickle protocols that torch.save does not use
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, ...
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise Problem(f"{source}: refused, it would load or run {code[1]}, which is no tensor; get the .safetensors "
                      "version" if code else f"{source}: not a whole file that torch.save wrote "
                      f"({type(error).__name__}); download it again") from None
    if not isinstance(content, Mapping):
        raise Problem(f"{source}: holds a {type(content).__name__}, expected a dict of tensors")
    return content.get("state_dict", content)


def _flatten(content: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, or, for an IP-Adapter's training checkpoint, only the adapter's, under the published names."""
    if not any(key.startswith("image_proj_model.") for key in tensors):
        return tensors
    places = sorted({m[1] for m in map(IN_UNET.match, tensors) if m}, key=lambda p: (p.startswith("mid"), p))
    adapter = {}
    for key, tensor in tensors.items():
        if inside := IN_UNET.match(key):  # down, up, mid; 1, 3, 5, ...
            key = f"adapter_modules.{2 * places.index(inside[1]) + 1}.{inside[2]}"
        for pattern, ours in TRAINED:
            if re.match(pattern, key):
                adapter[re.sub(pattern, ours, key)] = tensor
    return adapter


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """No two tensors share memory, which safetensors refuses; only those that do are copied."""
    seen, result = set(), {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[key] = (tensor.clone() if place in seen else tensor).contiguous()
        seen.add(place)
    return result
