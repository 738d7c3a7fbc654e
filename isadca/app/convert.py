"""PyTorch's pickles (.bin, .pth, .ckpt) to safetensors, on request. Nothing else in isadca unpickles.

PyTorch's weights_only reads tensors and plain values and runs nothing. Other classes that a file names, a trainer's or
NumPy's, become a `Placeholder`. PyTorch before 2.6 could be made to run code all the same (CVE-2025-32434).
"""

import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.files import atomic_write
from ..common.problem import Problem
from ..loading.checkpoints import read_header

# an IP-Adapter's training checkpoint; accelerate may store shared tensors once: adapter_modules are then in the UNet
TRAINED = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}
IN_UNET = re.compile(r"^unet\.(.+)\.attn2\.processor\.(to_[kv]_ip\.weight)$")
DEEPEST, MOST_NAMES, MOST_CLASSES = 20, 10**6, 200  # the most that a file may hold


class Placeholder:
    """Stands for an object whose class is not looked up. Nothing of it is kept."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class PlaceholderDict:
    """The same for a subclass of dict, into which the unpickler then puts items."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def convert(source: Path, out: Path) -> list[str]:
    """Write the tensors of `source`, in their dtypes, under the published names. Returns the keys left out.

    Unwraps "state_dict", joins nested dicts with dots, and makes an IP-Adapter of its training checkpoint (which may
    be a safetensors file). Raises Problem for files without tensors, and for tensors that safetensors cannot hold.
    """
    if out.exists() and source.exists() and out.samefile(source):
        raise Problem(f"{source}: is the file to write, too; choose another -o")
    values = _flatten(_read(source), source)
    found = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    tensors = published(found)
    if not tensors:
        raise Problem(f"{source}: holds no tensors; nothing to convert")
    if source.suffix == ".safetensors" and tensors.keys() == found.keys():
        raise Problem(f"{source}: is in safetensors already, under names that are not a training checkpoint's; use it")
    _check_plain(tensors, source)
    try:
        with atomic_write(out) as temporary:
            save_file(_apart(tensors), temporary, {"format": "pt"})
    except (SafetensorError, ValueError, RuntimeError) as error:  # a full disk
        raise Problem(f"{source}: cannot be written to {out} ({str(error).splitlines()[0][:100]}); check the "
                      "disk") from None
    kept = {id(tensor) for tensor in tensors.values()}
    return sorted(key for key, value in values.items() if id(value) not in kept)


def _read(source: Path) -> dict:
    """The dict of tensors in a file that torch.save wrote. Raises Problem."""
    if not source.is_file():
        raise Problem(f"{source}: no such file; check the path")
    if source.suffix == ".safetensors":
        read_header(source)  # explains what is wrong
        return load_file(source)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise Problem(f"torch {torch.__version__} is too old to open pickles safely; install 2.10 or newer")
    content = _unpickle(source)
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise Problem(f"{source}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


def _unpickle(source: Path) -> object:
    """What is in the file. A class that PyTorch does not allow is noted, and is a placeholder at the next try."""
    strange: dict[str, type] = {}
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals([(c, n) for n, c in strange.items()]):
                warnings.simplefilter("ignore")  # pickle protocols that torch.save does not use
                content = torch.load(source, "cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
            name = next(iter(strange)) if isinstance(content, Placeholder) else None
        except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, ...
            met = re.search(r"GLOBAL (\S+)", str(error))
            if met is None:
                raise Problem(f"{source}: not a whole file that torch.save wrote, or may not be read "
                              f"({type(error).__name__}); download it again, or look at its permissions") from None
            name = met[1] if "." in met[1] else f"builtins.{met[1]}"
        if name is None:
            return content
        if name in strange or len(strange) == MOST_CLASSES:  # os, sys: not even as a placeholder
            raise Problem(f"{source}: refused, it would load or run {name[:80]}, which is no tensor; get the "
                          ".safetensors version")
        strange[name] = PlaceholderDict if name.lower().endswith("dict") else Placeholder


def _flatten(content: dict, source: Path) -> dict[str, object]:
    """Nested keys joined with dots. Raises Problem where they are too deep or too many."""
    waiting, flat, names = [("", content, 0)], dict[str, object](), 0
    while waiting:
        prefix, inner, depth = waiting.pop()
        names += len(inner)
        if depth > DEEPEST or names > MOST_NAMES:
            raise Problem(f"{source}: its dicts hold one another without end; expected a dict of tensors")
        for key, value in dict.items(inner):
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                waiting.append((f"{name}.", value, depth + 1))
            elif name in flat and (isinstance(value, Tensor) or isinstance(flat[name], Tensor)):
                raise Problem(f"{source}: two tensors would be named {name[:80]}; rename one of them")
            else:
                flat[name] = value
    return flat


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, or, for an IP-Adapter's training checkpoint, only the adapter's, under the published names."""
    if not any(key.startswith("image_proj_model.") for key in tensors):
        return tensors
    places = sorted({m[1] for m in map(IN_UNET.match, tensors) if m}, key=lambda p: (p.startswith("mid"), p))
    adapter = {}
    for key, tensor in tensors.items():
        if inside := IN_UNET.match(key):  # down, up, mid; 1, 3, 5, ...
            key = f"adapter_modules.{2 * places.index(inside[1]) + 1}.{inside[2]}"
        for theirs, ours in TRAINED.items():
            if key.startswith(theirs):
                adapter[ours + key.removeprefix(theirs)] = tensor
    return adapter


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """No two tensors share memory, which safetensors refuses; only those that do are copied."""
    seen, apart = set(), {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = (tensor.clone() if place in seen else tensor).contiguous()
        seen.add(place)
    return apart


def _check_plain(tensors: dict[str, Tensor], source: Path) -> None:
    """Raise Problem for what safetensors cannot hold, and for a small file that claims to be a large one."""
    if "__metadata__" in tensors:
        raise Problem(f"{source}: a tensor is named __metadata__, which safetensors keeps for itself; rename it")
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_complex() or tensor.is_meta)
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise Problem(f"{source}: {key[:80]} is no plain tensor ({kind}, {tensor.layout}); expected one number a "
                          "place")
    if sum(tensor.nbytes for tensor in tensors.values()) > 8 * source.stat().st_size + 2**20:
        raise Problem(f"{source}: its tensors are many times as large as the file; expected a whole file")
