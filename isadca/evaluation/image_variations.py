"""Stable Diffusion Image Variations (lambdalabs, v2.0): the same UNet, conditioned on a picture instead of text.

Its whole context is one token, the picture's projected CLIP ViT-L/14 embedding; without guidance's condition, a zero.

Reference: lambdalabs/sd-image-variations-diffusers. Shapes: B rows, P projection width.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.images import CLIP_MEAN, CLIP_STD, fit
from ..loop import Run, decode, sample
from ..methods import PRESETS
from ..networks.model import Model
from ..reference import Reference


def squash_pixels(image: Image.Image, size: int) -> Tensor:
    """What this model's encoder was trained to read, (1,3,size,size): squashed, not cropped, and resized WITHOUT
    antialiasing. Its authors call this an oversight, but the results depend on it."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=False)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def vary_image(model: Model, image: Image.Image, steps: int = 50, guidance: float = 3.0,
               seeds: tuple[int, ...] = (0,)) -> list[Image.Image]:
    """Variations of a picture, one per seed. `model` is that repository's folder: it needs no text encoder."""
    vision: Any = model.vision  # the loader saw to it
    seen = vision(squash_pixels(image, vision.config.image_size).to(model.device, model.dtype))[0]  # (1,P): one token
    run = Run(seen, replace(PRESETS["plain"], guidance=guidance), seeds, torch.zeros_like(seen))
    [z] = sample(model, without_inversion(model, image, steps), [run], replayed=[None] * steps)
    return decode(model, z)


def without_inversion(model: Model, image: Image.Image, steps: int) -> Reference:
    """For a method that starts at noise and looks at no keys and values of the reference."""
    side = model.unet.config.sample_size
    chain = torch.zeros(steps + 1, 4, side, side, device=model.device, dtype=model.latent_dtype)
    return Reference(fit(image, model.size), chain, original=image)
