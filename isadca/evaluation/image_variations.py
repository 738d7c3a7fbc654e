"""Stable Diffusion Image Variations (lambdalabs, v2.0): the same UNet, told what to draw by a picture instead of text.

Its whole context is one token, the picture's projected CLIP ViT-L/14 embedding; without guidance's condition, a zero.

Reference: lambdalabs/sd-image-variations-diffusers. Shapes: B rows, P projection width.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.images import CLIP_MEAN, CLIP_STD
from ..common.progress import Progress, silent
from ..ddim import step
from ..loop import decode, guide
from ..networks.model import Model


def squash_pixels(image: Image.Image, size: int) -> Tensor:
    """What this model's encoder was trained to read, (1,3,size,size): squashed, not cropped, and resized WITHOUT
    antialiasing. By its authors' account an oversight; it makes a big difference to leave it out."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=False)
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


def vary_image(model: Model, image: Image.Image, steps: int = 50, guidance: float = 3.0, seeds: tuple[int, ...] = (0,),
               progress: Progress = silent) -> list[Image.Image]:
    """Variations of a picture, one per seed, by DDIM. `model` is that repository's folder: it needs no text encoder."""
    device, side = model.device, model.unet.config.sample_size
    vision: Any = model.vision  # the loader saw to it
    embed = vision(squash_pixels(image, vision.config.image_size).to(device, model.dtype))[0][:, None]
    context = torch.cat([torch.zeros_like(embed), embed]).repeat_interleave(len(seeds), 0)  # (2·B,1,P)
    z = torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                   for seed in seeds]).to(device, model.latent_dtype)
    for t, t_prev in progress(model.schedule.steps(steps), "sampling"):
        eps = guide(model.noise(z.repeat(2, 1, 1, 1), t, context).chunk(2), guidance)
        z = step(z, eps, model.schedule.alpha_bar(t), model.schedule.alpha_bar(t_prev))
    return decode(model, z)
