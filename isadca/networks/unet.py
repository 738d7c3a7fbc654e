"""The denoising UNet ε_θ(z_t, t, c) of Stable Diffusion 1.x: wiring only, the parts are in layers.py.

At SD1.5's sizes (`UNetConfig()`), for a 64 × 64 latent:

    level          0 (64²)      1 (32²)      2 (16²)      3 (8²)
    channels       320          640          1280         1280
    down           2 res+attn   2 res+attn   2 res+attn   2 res           each but the last ends in a downsample
    mid                                                   res, attn, res
    up             3 res+attn   3 res+attn   3 res+attn   3 res           each but level 0 ends in an upsample

Reference: LDM, arXiv 2112.10752. Shapes: B rows, h × w latent grid, M context tokens, D context width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attend, Site, attend as plain_attend
from .layers import Downsample2D, ResnetBlock2D, TimestepEmbedding, Transformer2D, Upsample2D, timestep_embedding
from .sizes import UNetConfig

EPS = 1e-5  # of the UNet's group norms; Transformer2D has its own


class DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, attends: bool, last: bool, config: UNetConfig):
        super().__init__()
        n, temb_dim, groups = config.layers_per_block, 4 * config.channels[0], config.norm_groups
        self.resnets = nn.ModuleList(
            [ResnetBlock2D(c_in if j == 0 else c_out, c_out, temb_dim, groups, EPS) for j in range(n)])
        self.attentions = nn.ModuleList(
            [Transformer2D(c_out, config.n_heads, config.context_dim, groups) for _ in range(n if attends else 0)])
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(c_out)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor, attend: Attend) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[j](x, context, attend)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        temb_dim, groups = 4 * config.channels[0], config.norm_groups
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, temb_dim, groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer2D(channels, config.n_heads, config.context_dim, groups)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor, attend: Attend) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, temb), context, attend)
        return self.resnets[1](x, temb)


class UpBlock(nn.Module):
    def __init__(self, c_ins: list[int], c_out: int, attends: bool, last: bool, config: UNetConfig):
        super().__init__()
        n, temb_dim, groups = len(c_ins), 4 * config.channels[0], config.norm_groups
        self.resnets = nn.ModuleList([ResnetBlock2D(c_in, c_out, temb_dim, groups, EPS) for c_in in c_ins])
        self.attentions = nn.ModuleList(
            [Transformer2D(c_out, config.n_heads, config.context_dim, groups) for _ in range(n if attends else 0)])
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(c_out)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor, attend: Attend, skips: list[Tensor]) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[-1 - j]], dim=1), temb)
            if self.attentions:
                x = self.attentions[j](x, context, attend)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Descent(nn.Module):
    """The way down and the middle, which the UNet and a ControlNet share."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c0, levels = config.channels[0], len(config.channels)
        self.time_embedding = TimestepEmbedding(c0, 4 * c0)
        self.conv_in = nn.Conv2d(config.in_channels, c0, 3, padding=1)

        self.down_blocks = nn.ModuleList()
        self.skip_channels = [c0]  # of every activation that the way up will see again
        for i, c_out in enumerate(config.channels):
            last = i == levels - 1
            block = DownBlock(config.channels[max(i - 1, 0)], c_out, config.attention[i], last, config)
            self.down_blocks.append(block)
            self.skip_channels += [c_out] * (config.layers_per_block + (not last))

        self.mid_block = MidBlock(config.channels[-1], config)

    def embed_time(self, z: Tensor, t: Tensor | int) -> Tensor:
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        return self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(z.dtype))

    def descend(self, x: Tensor, temb: Tensor, context: Tensor, attend: Attend) -> tuple[Tensor, list[Tensor]]:
        """conv_in's output (B,C,h,w) -> the middle's output, and every activation on the way, conv_in's first."""
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context, attend)
            skips = skips + more
        return self.mid_block(x, temb, context, attend), skips


class UNet(Descent):
    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__(config)
        c0, channels, skips = config.channels[0], config.channels[-1], list(self.skip_channels)
        self.up_blocks = nn.ModuleList()
        for i, c_out in reversed(list(enumerate(config.channels))):
            inputs = [channels] + [c_out] * config.layers_per_block
            self.up_blocks.append(
                UpBlock([c + skips.pop() for c in inputs], c_out, config.attention[i], i == 0, config))
            channels = c_out

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, c0, eps=EPS)
        self.conv_out = nn.Conv2d(c0, config.out_channels, 3, padding=1)
        self.sites = self._name_sites()

    def _name_sites(self) -> list[Site]:
        """Tell each attention layer who it is; `layer` counts transformer blocks in execution order."""
        places = ([(f"down_blocks.{i}", "down", block) for i, block in enumerate(self.down_blocks)]
                  + [("mid_block", "mid", self.mid_block)]
                  + [(f"up_blocks.{i}", "up", block) for i, block in enumerate(self.up_blocks)])
        sites = []
        for prefix, place, block in places:
            for j, transformer in enumerate(block.attentions):
                layer, name = len(sites) // 2, f"{prefix}.attentions.{j}.transformer_blocks.0"
                inner = transformer.transformer_blocks[0]
                inner.attn1.site = Site(f"{name}.attn1", "self", place, layer)
                inner.attn2.site = Site(f"{name}.attn2", "cross", place, layer)
                sites += [inner.attn1.site, inner.attn2.site]
        return sites

    def forward(self, z: Tensor, t: Tensor | int, context: Tensor, attend: Attend = plain_attend,
                residuals: list[Tensor] | None = None) -> Tensor:
        """The predicted noise. z (B,4,h,w), t an int or (B,), context (B,M,D) -> (B,4,h,w).

        h and w must be multiples of 2^(levels - 1), 8 for SD1.5. `attend` is called at every attention layer.
        `residuals` are a ControlNet's: one is added to each activation that the way up sees again, the last to x.
        """
        temb = self.embed_time(z, t)
        x, skips = self.descend(self.conv_in(z), temb, context, attend)
        if residuals is not None:
            x, skips = x + residuals[-1], [skip + r for skip, r in zip(skips, residuals)]
        for block in self.up_blocks:
            n = len(block.resnets)
            x = block(x, temb, context, attend, skips[-n:])
            skips = skips[:-n]
        return self.conv_out(F.silu(self.conv_norm_out(x)))
