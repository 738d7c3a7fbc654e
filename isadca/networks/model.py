"""The loaded networks together, and the few calls between them that the loop needs. `isadca.load` makes one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..attention import KV, Attend, attend as plain_attend
from ..common.images import clip_pixels
from ..common.problem import Problem, expect_all
from ..ddim import Schedule
from .clip import CLIPText, CLIPVision
from .ip_adapter import IPAdapter
from .tokenizer import Tokenizer
from .unet import Edit, UNet
from .vae import VAE


@dataclass(kw_only=True, repr=False, eq=False)
class Model:
    """Everything a run needs, loaded. Nothing in it changes while it runs."""

    unet: UNet
    vae: VAE
    text: CLIPText
    tokenizer: Tokenizer
    schedule: Schedule
    vision: CLIPVision | None
    ip_adapter: IPAdapter | None
    device: torch.device
    dtype: torch.dtype
    files: dict[str, Path] = field(default_factory=dict)  # which file each network came from

    def __repr__(self) -> str:
        image = "with" if self.ip_adapter else "without"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<isadca.Model: {self.size} pixels, {image} an IP-Adapter, {dtype} on {self.device}>"

    @property
    def size(self) -> int:
        """Side in pixels of the pictures it was trained on."""
        return self.unet.config.sample_size * self.vae.config.downscale

    @property
    def multiple(self) -> int:
        """In pixels, what each side of a picture must be a multiple of: the UNet halves the latent at every level."""
        return self.vae.config.downscale * 2 ** (len(self.unet.config.channels) - 1)

    def check_size(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """(width, height), if the networks can work at it; a number is both. Raises Problem."""
        width, height = size if isinstance(size, tuple) else (size, size)
        expect_all("size", (width, height), int, "a side in pixels, or (width, height)")
        if any(not self.multiple <= side <= 4096 or side % self.multiple for side in (width, height)):
            raise Problem(f"size is {width}×{height}, expected multiples of {self.multiple} to 4096; try {self.size}")
        return width, height

    def noise(self, z: Tensor, t: Tensor | int, context: Tensor | KV, attend: Attend = plain_attend,
              edit: Edit | None = None) -> Tensor:
        """ε_θ(z_t, t, c), computed in the model's dtype and given in that of z."""
        return self.unet(z.to(self.dtype), t, context, attend, edit=edit).to(z.dtype)

    def context(self, prompts: Sequence[str | Tensor]) -> Tensor:
        """Prompts, or embeddings (tokens, width) in their place -> (len, tokens, width). Raises Problem."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        made = iter(self.text(self.tokenizer(texts).to(self.device)) if texts else ())
        rows = [next(made) if isinstance(prompt, str) else prompt.to(self.device, self.dtype) for prompt in prompts]
        shapes, width = [tuple(row.shape) for row in rows], self.unet.config.context_dim
        if shapes != [(len(rows[0]), width)] * len(rows):
            raise Problem(f"prompts are {shapes}, expected embeddings (tokens, {width}), as many tokens in each")
        return torch.stack(rows)

    def encode(self, pixels: Tensor) -> Tensor:
        return Watch(self, "encoding")(self.vae.encode(pixels.to(self.device, self.vae_dtype)).to(self.latent_dtype))

    def decode(self, z: Tensor) -> Tensor:
        return Watch(self, "decoding")(self.vae.decode(z.to(self.vae_dtype)))

    def image_tokens(self, image: Image.Image | None = None, embeds: Tensor | None = None) -> Tensor:
        """The adapter's tokens, [no image, image], (2,n,D), of a picture or of an encoder's `embeds`: (1,P), or the
        (1,L,W) patch states that the plus family reads. Raises Problem where something is missing or does not fit."""
        adapter = self.ip_adapter
        if adapter is None:
            raise Problem("the image branch needs an IP-Adapter; give one with --ip-adapter, or --ip-scale 0")
        embeds = self._see(image) if embeds is None else embeds
        if (embeds.ndim, len(embeds), embeds.shape[-1]) != (2 + adapter.reads_patches, 1, adapter.embed_dim):
            expected = f"(1, patches, {adapter.embed_dim})" if adapter.reads_patches else f"(1, {adapter.embed_dim})"
            raise Problem(f"image_embeds are {tuple(embeds.shape)}, this IP-Adapter reads {expected}")
        embeds = embeds.to(self.device, self.dtype)
        return adapter.tokens(embeds, self._see(None) if adapter.reads_patches else torch.zeros_like(embeds))

    def _see(self, image: Image.Image | None) -> Tensor:
        """What the adapter reads of a picture: its embedding or its patch states. None is an all-zero input."""
        if self.vision is None:
            raise Problem("the IP-Adapter needs an image encoder; give one with --image-encoder")
        side = self.vision.config.image_size
        pixels = torch.zeros(1, 3, side, side) if image is None else clip_pixels(image, side)
        embedding, patches = self.vision(pixels.to(self.device, self.dtype))
        return patches if self.ip_adapter.reads_patches else embedding

    @property
    def latent_dtype(self) -> torch.dtype:
        """Of the latents between the steps: float32, or wider where the networks are."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype


class Watch:
    """Raises Problem for inf and NaN in what it is called with: one result, or a latent at each step t of a loop.

    A CPU stops at once. A GPU is not waited for: each step leaves a flag on it, and `done` reads them at the end.
    """

    def __init__(self, model: Model, stage: str):
        self.model, self.stage = model, stage
        self.flags: list[tuple[int | None, Tensor]] = []

    def __call__(self, x: Tensor, t: int | None = None) -> Tensor:
        self.flags.append((t, x.isfinite().all()))
        if t is None or x.device.type == "cpu":
            self.done()
        return x

    def done(self) -> None:
        for t, finite in self.flags:
            if not finite:
                from .not_finite import not_finite
                raise not_finite(self.model, self.stage, t)
        self.flags.clear()
