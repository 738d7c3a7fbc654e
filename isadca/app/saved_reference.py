"""A reference as a safetensors file, with the sha256 of all that its inversion depended on."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..common.files import atomic_write
from ..common.problem import Problem
from ..loading.checkpoints import check_header, read_header
from ..reference import Reference
from .recipe import differing


def save_reference(ref: Reference, path: str | Path, weights: str) -> None:
    """Write a reference as safetensors; `weights` says which model made it (the commands: its files' sha256)."""
    tensors = {"chain": ref.chain.contiguous().cpu(), "image": torch.from_numpy(np.array(ref.image))}
    if ref.original is not None and ref.original.size != ref.image.size:  # what the image prompt's encoder sees
        tensors["original"] = torch.from_numpy(np.array(ref.original.convert("RGB")))
    about = {"format": "isadca reference 1", "prompt": ref.prompt, "weights": weights}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, about)
    except SafetensorError as error:  # a full disk, for one
        raise Problem(f"{path}: cannot write there ({error}); choose another -o") from None


def is_reference(path: Path, damaged: bool = False) -> bool:
    """Whether a safetensors file is a saved reference; of one that cannot be read, `damaged`."""
    try:
        return read_header(path).metadata.get("format", "").startswith("isadca reference")
    except Problem:
        return damaged


def load_reference(path: str | Path, weights: str | None = None, device: torch.device | str = "cpu") -> Reference:
    """Read a saved reference. Raises Problem for another kind of file and, unless `weights` is None, for one that
    other weights made."""
    path = Path(path)
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != "isadca reference 1":
                raise Problem(f"{path}: not a reference; make one with: isadca invert PICTURE -o {path.name}")
            chain, pixels = file.get_tensor("chain"), file.get_tensor("image")
            original = file.get_tensor("original" if "original" in file.keys() else "image")
    except FileNotFoundError:
        raise Problem(f"{path}: no such file; make one with: isadca invert PICTURE -o {path.name}") from None
    except (OSError, SafetensorError) as error:
        raise Problem(f"{path}: not a whole safetensors file, or may not be read ({error}); invert the picture "
                      "again, or look at its permissions") from None
    if weights is not None and about.get("weights") != weights:
        changed = _changed(about.get("weights", ""), weights)
        raise Problem(f"{path}: was inverted with other weights (another {changed}); invert the picture again with "
                      "these")
    if not _whole(chain, pixels) or not _whole(chain, original, fitted=False):
        raise Problem(f"{path}: a damaged reference; invert the picture again")
    return Reference(Image.fromarray(pixels.numpy()), chain.to(device), about.get("prompt", ""),
                     Image.fromarray(original.numpy()))


def _whole(chain: torch.Tensor, picture: torch.Tensor, fitted: bool = True) -> bool:
    """Whether these are latents and a picture; if it was fitted to them, its sides are one multiple of theirs."""
    if chain.ndim != 4 or picture.ndim != 3 or 0 in (*chain.shape, *picture.shape) or picture.dtype != torch.uint8:
        return False
    (steps, channels, h, w), (height, width, colours) = chain.shape, picture.shape
    return (steps > 1 and (channels, colours) == (4, 3) and chain.dtype in (torch.float32, torch.float64)
            and bool(chain.isfinite().all()) and (not fitted or height % h == 0 and height * w == width * h))


def _changed(before: str, now: str) -> str:
    """Which file is not the same."""
    try:
        return differing(json.loads(before), json.loads(now)) or "sha256"
    except (ValueError, TypeError, AttributeError, RecursionError):  # forged, or a name of the caller's own
        return "sha256"
