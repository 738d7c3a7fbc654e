"""Stable Diffusion Image Variations (lambdalabs, v2.0), as the paper compares with it: no prompt, a picture instead.

    isadca evaluate weights/demo/pairs -o results --systems isadca,examples/counterparts/image_variations.py:SYSTEM

Stable Diffusion's UNet, fine-tuned to read one token, the picture's projected CLIP ViT-L/14 embedding, in place of
the text. The unconditional half of guidance reads zeros.

Reference: lambdalabs/sd-image-variations-diffusers. Shapes: B rows, P projection width.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from isadca import PRESETS, Model, Problem, Run, decode, sample
from isadca.common.images import CLIP_MEAN, CLIP_STD
from isadca.ddim import Schedule
from isadca.evaluation.systems import Draw, System, without_inversion
from isadca.loading.checkpoints import load_into
from isadca.loading.load import build, find_part, vae_dtype


def squash_pixels(image: Image.Image, size: int) -> Tensor:
    """What this model's encoder was trained to read, (1,3,size,size): squashed, not cropped, and resized WITHOUT
    antialiasing. Its authors call this an oversight, but the results depend on it."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=False)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def vary_image(model: Model, image: Image.Image, steps: int = 50, guidance: float = 3.0,
               seeds: tuple[int, ...] = (0,)) -> list[Image.Image]:
    """Variations of a picture, one per seed. `model` is what `load_image_variations` gives."""
    pixels = squash_pixels(image, model.vision.config.image_size)
    seen = model.vision(pixels.to(model.device, model.dtype))[0]  # (1,P): one token
    run = Run(seen, replace(PRESETS["plain"], guidance=guidance), seeds, negative=torch.zeros_like(seen))
    [z] = sample(model, without_inversion(model, image, steps), [run], replayed=[None] * steps)
    return decode(model, z)


def load_image_variations(folder: str | Path, dtype: torch.dtype = torch.float32,
                          device: torch.device | str = "cpu") -> Model:
    """The published folder: unet/, vae/ and image_encoder/. The model has no text encoder. Raises Problem."""
    folder, networks, files = Path(folder), {}, {}
    for kind, name in (("unet", "unet"), ("vae", "vae"), ("vision", "image_encoder")):
        part = find_part(folder / name, kind, dtype)
        own = vae_dtype(dtype) if kind == "vae" else dtype
        networks[kind], files[kind] = load_into(build(part), part, own, device), part.path
    gives, expected = networks["vision"].config.projection_dim, networks["unet"].config.context_dim
    if gives != expected:
        raise Problem(f"{files['vision']}: an image encoder that projects to {gives}, the UNet expects {expected}; "
                      "they belong to different models")
    nothing: Any = None
    return Model(**networks, text=nothing, tokenizer=nothing, schedule=Schedule(), ip_adapter=None,
                 device=torch.device(device), dtype=dtype, files=files)


def prepare(folder: Path, model: Model, weights: Path, steps: int) -> Draw:
    own = load_image_variations(folder, model.dtype, model.device)
    return lambda image, prompt, seed: vary_image(own, image, steps, seeds=(seed,))[0]


SYSTEM = System("image-variations", "SD image-variations", prepare, needs="image-variations",
                paper=(0.6401, 0.5248, 0.0212, 0.8545))
