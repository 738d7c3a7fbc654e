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
from ..reference import Reference
from .recipe import differing, fingerprint


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


def load_reference(path: str | Path, weights: str | None, device: torch.device | str = "cpu") -> Reference:
    """Read a saved reference. Raises Problem for another kind of file and, unless `weights` is None, for one that
    other weights made."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != "isadca reference 1":
                raise Problem(f"{path}: not a reference; make one with: isadca invert PICTURE -o {path.name}")
            chain, pixels = file.get_tensor("chain"), file.get_tensor("image")
            original = file.get_tensor("original" if "original" in file.keys() else "image")
    except FileNotFoundError:
        raise Problem(f"{path}: no such file; make one with: isadca invert PICTURE -o {path.name}") from None
    except (OSError, SafetensorError) as error:
        raise Problem(f"{path}: not a whole safetensors file ({error}); invert the picture again") from None
    if weights is not None and about.get("weights") != weights:
        _check_weights(path, about.get("weights", ""), weights)
    h, side = chain.shape[-1:], pixels.shape[:1]
    if (chain.shape[1:] != (4, *h, *h) or len(chain) < 2 or pixels.shape != (*side, *side, 3) or 0 in (*h, *side)
            or side[0] % h[0] or chain.dtype not in (torch.float32, torch.float64) or pixels.dtype != torch.uint8
            or not chain.isfinite().all() or original.dtype != torch.uint8 or original.ndim != 3
            or original.shape[2] != 3 or 0 in original.shape):
        raise Problem(f"{path}: a damaged reference; invert the picture again")
    return Reference(Image.fromarray(pixels.numpy()), chain.to(device), about.get("prompt", ""),
                     Image.fromarray(original.numpy()))


def _check_weights(path: Path, before: str, now: str) -> None:
    """Raise Problem that names the file which changed. Older references hold one sha256 for the three networks."""
    changed = "sha256"
    try:
        if before == fingerprint(json.loads(now)):
            return
        changed = differing(json.loads(before), json.loads(now)) or changed
    except (ValueError, TypeError, AttributeError, RecursionError):  # forged, or a name of the caller's own
        pass
    raise Problem(f"{path}: was inverted with other weights (another {changed}); invert the picture again with these")
