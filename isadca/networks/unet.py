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

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import KV, Attend, Site, attend as plain_attend
from .cpu_conv import speed_up_convolutions
from .layers import Downsample2D, ResnetBlock2D, TimestepEmbedding, Transformer2D, Upsample2D, timestep_embedding
from .sizes import UNetConfig

EPS = 1e-5  # of the UNet's group norms; Transformer2D has its own

Edit = Callable[[Tensor, str], Tensor]  # (B,C,h,w) and the place it comes from -> what takes its place


def unedited(h: Tensor, place: str) -> Tensor:
    return h


class Block(nn.Module):
    """Resnets, each followed by a transformer while there are any. The middle is one; the other two add to it."""

    def __init__(self, name: str, c_ins: list[int], c_out: int, transformers: int, config: UNetConfig):
        super().__init__()
        self.name = name  # its checkpoint prefix
        temb_dim, groups = 4 * config.channels[0], config.norm_groups
        self.resnets = nn.ModuleList([ResnetBlock2D(c_in, c_out, temb_dim, groups, EPS) for c_in in c_ins])
        self.attentions = nn.ModuleList(
            [Transformer2D(c_out, config.n_heads, config.context_dim, groups) for _ in range(transformers)])

    def layer(self, j: int, x: Tensor, temb: Tensor, context: Tensor | KV, attend: Attend, edit: Edit) -> Tensor:
        x = edit(self.resnets[j](x, temb), f"{self.name}.resnets.{j}")
        if j < len(self.attentions):
            x = edit(self.attentions[j](x, context, attend), f"{self.name}.attentions.{j}")
        return x

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | KV, attend: Attend, edit: Edit) -> Tensor:
        for j in range(len(self.resnets)):
            x = self.layer(j, x, temb, context, attend, edit)
        return x


class DownBlock(Block):
    def __init__(self, name: str, c_in: int, c_out: int, attends: bool, last: bool, config: UNetConfig):
        n = config.layers_per_block
        super().__init__(name, [c_in] + [c_out] * (n - 1), c_out, n if attends else 0, config)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(c_out)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | KV, attend: Attend,
                edit: Edit) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for j in range(len(self.resnets)):
            x = self.layer(j, x, temb, context, attend, edit)
            skips.append(x)
        for downsample in self.downsamplers:
            x = edit(downsample(x), f"{self.name}.downsamplers.0")
            skips.append(x)
        return x, skips


class UpBlock(Block):
    """Each resnet reads x and one skip, the activation that the way down left at this size, last one first."""

    def __init__(self, name: str, c_ins: list[int], c_out: int, attends: bool, last: bool, config: UNetConfig):
        super().__init__(name, c_ins, c_out, len(c_ins) if attends else 0, config)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(c_out)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor | KV, attend: Attend, edit: Edit,
                skips: list[Tensor]) -> Tensor:
        for j, skip in enumerate(reversed(skips)):
            skip = edit(skip, f"{self.name}.skips.{j}")
            x = self.layer(j, torch.cat([x, skip], dim=1), temb, context, attend, edit)
        for upsample in self.upsamplers:
            x = edit(upsample(x), f"{self.name}.upsamplers.0")
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
            c_in, last = config.channels[max(i - 1, 0)], i == levels - 1
            self.down_blocks.append(DownBlock(f"down_blocks.{i}", c_in, c_out, config.attention[i], last, config))
            self.skip_channels += [c_out] * (config.layers_per_block + (not last))

        self.mid_block = Block("mid_block", [config.channels[-1]] * 2, config.channels[-1], 1, config)
        self.sites = name_sites([*self.down_blocks, self.mid_block])

    def keys_values(self, context: Tensor) -> KV:
        """The text's keys and values at every cross-attention, by site name. They do not depend on t: `forward`
        takes them in place of `context`, so that a prompt is projected once and not at every step."""
        return {site.name: self.get_submodule(site.name).keys_values(context)
                for site in self.sites if site.kind == "cross"}

    def embed_time(self, z: Tensor, t: Tensor | int) -> Tensor:
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        return self.time_embedding(timestep_embedding(t, self.config.channels[0]).to(z.dtype))

    def descend(self, x: Tensor, temb: Tensor, context: Tensor | KV, attend: Attend,
                edit: Edit = unedited) -> tuple[Tensor, list[Tensor]]:
        """conv_in's output (B,C,h,w) -> the middle's output, and every activation on the way, conv_in's first."""
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, temb, context, attend, edit)
            skips = skips + more
        return self.mid_block(x, temb, context, attend, edit), skips


class UNet(Descent):
    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__(config)
        c0, c_in, skips = config.channels[0], config.channels[-1], list(self.skip_channels)
        self.up_blocks = nn.ModuleList()
        for i, (c_out, attends) in enumerate(zip(config.channels[::-1], config.attention[::-1])):
            c_ins = [c + skips.pop() for c in [c_in] + [c_out] * config.layers_per_block]
            last = i == len(config.channels) - 1
            self.up_blocks.append(UpBlock(f"up_blocks.{i}", c_ins, c_out, attends, last, config))
            c_in = c_out

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, c0, eps=EPS)
        self.conv_out = nn.Conv2d(c0, config.out_channels, 3, padding=1)
        self.sites = name_sites(self.blocks)
        speed_up_convolutions(self)

    @property
    def blocks(self) -> list[Block]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    @property
    def places(self) -> list[str]:
        """Where `edit` is called, in the order of execution: after each module of that name, and for
        up_blocks.*.skips.*, on a skip before it is joined to x."""
        found = ["conv_in"]
        for block in self.blocks:
            for j in range(len(block.resnets)):
                found += [f"{block.name}.skips.{j}"] if isinstance(block, UpBlock) else []
                found += [f"{block.name}.resnets.{j}"]
                found += [f"{block.name}.attentions.{j}"] if j < len(block.attentions) else []
            found += [f"{block.name}.{name}.0" for name in ("downsamplers", "upsamplers") if getattr(block, name, ())]
        return found

    def forward(self, z: Tensor, t: Tensor | int, context: Tensor | KV, attend: Attend = plain_attend,
                residuals: list[Tensor] | None = None, edit: Edit | None = None) -> Tensor:
        """The predicted noise. z (B,4,h,w), t an int or (B,), context (B,M,D) or its `keys_values` -> (B,4,h,w).

        h and w must be multiples of 2^(levels - 1), 8 for SD1.5. `attend(q, k, v, site)` is called at every attention
        layer, `edit(h, place)` at every one of `places`; what it returns takes h's place. `residuals` are a
        ControlNet's: one is added to each activation that the way up sees again, the last to x.
        """
        edit = edit or unedited
        temb = self.embed_time(z, t)
        x, skips = self.descend(edit(self.conv_in(z), "conv_in"), temb, context, attend, edit)
        if residuals is not None:
            x, skips = x + residuals[-1], [skip + r for skip, r in zip(skips, residuals)]
        for block in self.up_blocks:
            n = len(block.resnets)
            x = block(x, temb, context, attend, edit, skips[-n:])
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
