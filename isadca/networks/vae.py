"""The autoencoder of Stable Diffusion 1.x (KL-f8): pixels in [-1, 1] <-> scaled latents.

Reference: LDM, arXiv 2112.10752. Shapes: B rows, H × W pixels, h × w latent grid, f = H/h (8 for SD1.5).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend
from .layers import Attention, Downsample2D, ResnetBlock2D, Upsample2D
from .sizes import VAEConfig

EPS = 1e-6  # everywhere in the VAE


class ImageAttention(Attention):
    """Single-head self-attention over the grid, with a norm and biases of its own; always plain."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B,C,h,w) -> (B,N,C)
        y = super().forward(tokens, tokens, attend)
        return x + y.transpose(1, 2).unflatten(2, x.shape[-2:])


class VAEBlock(nn.Module):
    """Resnets, in the middle with attention after the first; then a change of the grid's size, if any."""

    def __init__(self, c_in: int, c_out: int, n: int, groups: int, kind: str = ""):
        super().__init__()
        c_ins = [c_in] + [c_out] * (n - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(c, c_out, None, groups, EPS) for c in c_ins)
        self.attentions = nn.ModuleList([ImageAttention(c_out, groups)] if kind == "mid" else [])
        self.downsamplers = nn.ModuleList([Downsample2D(c_out, symmetric=False)] if kind == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample2D(c_out)] if kind == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.resnets
        for layer in [first, *self.attentions, *others, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class VAEEncoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups, n = config.channels, config.norm_groups, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAEBlock(channels[max(i - 1, 0)], c, n, groups, "down" if i < len(channels) - 1 else "")
            for i, c in enumerate(channels))
        self.mid_block = VAEBlock(channels[-1], channels[-1], 2, groups, "mid")
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in [self.conv_in, *self.down_blocks, self.mid_block]:
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEDecoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups, n = config.channels[::-1], config.norm_groups, config.layers_per_block + 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = VAEBlock(channels[0], channels[0], 2, groups, "mid")
        self.up_blocks = nn.ModuleList(
            VAEBlock(channels[max(i - 1, 0)], c, n, groups, "up" if i < len(channels) - 1 else "")
            for i, c in enumerate(channels))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        for layer in [self.conv_in, self.mid_block, *self.up_blocks]:
            z = layer(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class VAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = VAEEncoder(config)
        self.decoder = VAEDecoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), unscaled. (B,3,H,W) -> two of (B,4,h,w)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor) -> Tensor:
        """Pixels in [-1,1] (B,3,H,W) -> z_0 (B,4,h,w): the posterior's mean (nothing is sampled), scaled."""
        return self.posterior(x)[0] * self.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """z_0 (B,4,h,w) -> pixels (B,3,H,W), nominally in [-1,1]; not clipped."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))
