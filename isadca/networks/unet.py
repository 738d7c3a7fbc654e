"""The denoising UNet ε_θ(z_t, t, c) of Stable Diffusion 1.x: wiring only, the parts are in layers.py.

At SD1.5's sizes (`UNetConfig()`), for a 64 × 64 latent:

    level          0 (64²)      1 (32²)      2 (16²)      3 (8²)
    channels       320          640          1280         1280
    down           2 res+attn   2 res+attn   2 res+attn   2 res           each but the last ends in a downsample
    mid                                                   res, attn, res
    up             3 res+attn   3 res+attn   3 res+attn   3 res           each but level 0 ends in an upsample

Two functions can be passed in: `attend`, called at every attention layer, and `edit`, called on every activation.
Reference: LDM, arXiv 2112.10752. Shapes: B rows, h × w latent grid, M context tokens, D context width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import KV, Attend, Site, attend as plain_attend
from .cpu_conv import speed_up_convolutions
from .layers import Downsample2D, ResnetBlock2D, TimestepEmbedding, Transformer2D, Upsample2D, timestep_embedding
from .sizes import UNetConfig

EPS = 1e-5  # of the UNet's group norms; Transformer2D has its own

Edit = Callable[[Tensor, str], Tensor]  # an activation (B,C,h,w) and its place -> what goes on in its stead


def unedited(h: Tensor, place: str) -> Tensor:
    return h


class Inputs(NamedTuple):
    """What every block of one forward pass reads besides the activation."""

    temb: Tensor
    context: Tensor | KV
    attend: Attend
    edit: Edit = unedited


class Block(nn.Module):
    """Resnets, each followed by a transformer while there are any, then a change of the grid's size, if any.

    On the way up, each resnet also reads a skip: what the way down left at this size, the last one first.
    """

    def __init__(self, name: str, c_ins: list[int], c_out: int, transformers: int, config: UNetConfig,
                 down: bool = False, up: bool = False):
        super().__init__()
        self.name = name  # its checkpoint prefix
        temb_dim, groups = 4 * config.channels[0], config.norm_groups
        self.resnets = nn.ModuleList(ResnetBlock2D(c_in, c_out, temb_dim, groups, EPS) for c_in in c_ins)
        self.attentions = nn.ModuleList(
            Transformer2D(c_out, config.n_heads, config.context_dim, groups) for _ in range(transformers))
        self.downsamplers = nn.ModuleList([Downsample2D(c_out)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample2D(c_out)] if up else [])

    def activations(self, x: Tensor, inputs: Inputs, skips: Sequence[Tensor] = ()) -> list[Tensor]:
        """The output of each step of the block; the last is the block's."""
        temb, context, attend, edit = inputs
        found = []
        for j, resnet in enumerate(self.resnets):
            if skips:
                skip = edit(skips[-1 - j], f"{self.name}.skips.{j}")
                x = torch.cat([x, skip], dim=1)
            x = edit(resnet(x, temb), f"{self.name}.resnets.{j}")
            if j < len(self.attentions):
                x = edit(self.attentions[j](x, context, attend), f"{self.name}.attentions.{j}")
            found.append(x)
        for downsample in self.downsamplers:
            found.append(edit(downsample(x), f"{self.name}.downsamplers.0"))
        for upsample in self.upsamplers:
            found.append(edit(upsample(x), f"{self.name}.upsamplers.0"))
        return found

    def forward(self, x: Tensor, inputs: Inputs, skips: Sequence[Tensor] = ()) -> Tensor:
        return self.activations(x, inputs, skips)[-1]


class DownBlock(Block):
    def forward(self, x: Tensor, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """Its output, and all that the way up reads again."""
        found = self.activations(x, inputs)
        return found[-1], found


class Descent(nn.Module):
    """The way down and the middle, which the UNet and a ControlNet share."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c0, n = config.channels[0], config.layers_per_block
        self.time_embedding = TimestepEmbedding(c0, 4 * c0)
        self.conv_in = nn.Conv2d(config.in_channels, c0, 3, padding=1)

        self.down_blocks = nn.ModuleList()
        self.skip_channels = [c0]  # of every activation that the way up reads again
        c_in = c0
        for i, (c_out, attends) in enumerate(zip(config.channels, config.attention)):
            down = i < len(config.channels) - 1
            c_ins = [c_in] + [c_out] * (n - 1)
            self.down_blocks.append(DownBlock(f"down_blocks.{i}", c_ins, c_out, n if attends else 0, config, down))
            self.skip_channels += [c_out] * (n + down)
            c_in = c_out

        self.mid_block = Block("mid_block", [c_in, c_in], c_in, 1, config)
        self.sites = name_sites([*self.down_blocks, self.mid_block])

    def keys_values(self, context: Tensor) -> KV:
        """The text's keys and values in every cross-attention, by site name. They do not depend on t: `forward` takes
        them in place of `context`, so that a prompt is projected once rather than at every step."""
        return {site.name: self.get_submodule(site.name).keys_values(context)
                for site in self.sites if site.kind == "cross"}

    def embed_time(self, z: Tensor, t: Tensor | int) -> Tensor:
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        return self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(z.dtype))

    def descend(self, x: Tensor, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """conv_in's output (B,C,h,w) -> the middle's output, and every skip, conv_in's output first."""
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, inputs)
            skips = skips + more
        return self.mid_block(x, inputs), skips


class UNet(Descent):
    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__(config)
        c0, c_in, skips = config.channels[0], config.channels[-1], list(self.skip_channels)
        n = config.layers_per_block + 1
        self.up_blocks = nn.ModuleList()
        for i, (c_out, attends) in enumerate(zip(config.channels[::-1], config.attention[::-1])):
            c_ins = [c + skips.pop() for c in [c_in] + [c_out] * (n - 1)]
            up = i < len(config.channels) - 1
            self.up_blocks.append(Block(f"up_blocks.{i}", c_ins, c_out, n if attends else 0, config, up=up))
            c_in = c_out

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, c0, eps=EPS)
        self.conv_out = nn.Conv2d(c0, config.out_channels, 3, padding=1)
        self.sites = name_sites([*self.down_blocks, self.mid_block, *self.up_blocks])
        speed_up_convolutions(self)

    def forward(self, z: Tensor, t: Tensor | int, context: Tensor | KV, attend: Attend = plain_attend,
                residuals: list[Tensor] | None = None, edit: Edit | None = None) -> Tensor:
        """The predicted noise. z (B,4,h,w), t an int or (B,), context (B,M,D) or its `keys_values` -> (B,4,h,w).

        h and w must be multiples of 2^(levels - 1), 8 for SD1.5. `attend(q, k, v, site)` is called in every attention
        layer. `edit(h, place)` is called on the output of conv_in and of every module named *.resnets.*,
        *.attentions.*, *.downsamplers.0 and *.upsamplers.0, under that name, and on each skip before it is joined to
        x, as up_blocks.*.skips.*. `residuals` are a ControlNet's: one is added to each skip, the last to the middle.
        """
        inputs = Inputs(self.embed_time(z, t), context, attend, edit or unedited)
        x, skips = self.descend(inputs.edit(self.conv_in(z), "conv_in"), inputs)
        if residuals is not None:
            x, skips = x + residuals[-1], [skip + r for skip, r in zip(skips, residuals)]
        for block in self.up_blocks:
            n = len(block.resnets)
            x = block(x, inputs, skips[-n:])
            skips = skips[:-n]
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def name_sites(blocks: list[Block]) -> list[Site]:
    """Tell each attention layer who it is; `layer` counts transformer blocks in execution order."""
    sites: list[Site] = []
    for block in blocks:
        place = block.name.split("_")[0]
        for j, transformer in enumerate(block.attentions):
            inner = transformer.transformer_blocks[0]
            name, layer = f"{block.name}.attentions.{j}.transformer_blocks.0", len(sites) // 2
            inner.attn1.site = Site(f"{name}.attn1", "self", place, layer)
            inner.attn2.site = Site(f"{name}.attn2", "cross", place, layer)
            sites += [inner.attn1.site, inner.attn2.site]
    return sites
