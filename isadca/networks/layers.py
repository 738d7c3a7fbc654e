"""What the UNet and the VAE are made of. Attribute names are diffusers' checkpoint keys, so a published file loads
with `load_state_dict(strict=True)` and no mapping.

References: LDM, arXiv 2112.10752; the file layout of diffusers' UNet2DConditionModel.
Shapes: B rows, C channels, h × w grid, N = h·w tokens, M context tokens, D context width, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import KV, Attend, Site, repeat_rows


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the time step, cosines first. (B,) -> (B, dim), computed in float32 as in training."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int, temb_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, temb_dim)
        self.linear_2 = nn.Linear(temb_dim, temb_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # (B, dim) -> (B, 4·dim)


class ResnetBlock2D(nn.Module):
    """norm, silu, conv, twice, around a residual; the time embedding is added in between (not in the VAE)."""

    def __init__(self, c_in: int, c_out: int, temb_dim: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, c_out) if temb_dim else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nn.Module):
    """Stride-2 convolution. The UNet pads all four sides, the VAE right and bottom only (as LDM trained it)."""

    def __init__(self, channels: int, symmetric: bool = True):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Attention(nn.Module):
    """Project to q, k, v; call the `attend` that was passed in; project back. The seam is the middle line."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.site: Site | None = None  # set by the UNet when it is built

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """K = W_K c and V = W_V c. (B,M,D) -> two of (B,H,M,d)."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(self, x: Tensor, context: Tensor | KV, attend: Attend) -> Tensor:
        """x (B,N,C); `context` (B,M,D), or the keys and values that `UNet.keys_values` made of it."""
        q = split_heads(self.to_q(x), self.heads)
        if isinstance(context, Tensor):
            k, v = self.keys_values(context)
        else:
            k, v = (repeat_rows(y, len(q)) for y in context[self.site.name])
        return self.to_out[0](merge_heads(attend(q, k, v, self.site)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B,N,H·d) -> (B,H,N,d)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B,H,N,d) -> (B,N,H·d)


class GEGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # the exact GELU, not the tanh approximation


class FeedForward(nn.Module):
    def __init__(self, dim: int, widen: type[nn.Module] = GEGLU):
        super().__init__()
        self.net = nn.ModuleDict({"0": widen(dim, 4 * dim), "2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on normed input and around a residual."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | KV, attend: Attend) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed, attend)
        x = x + self.attn2(self.norm2(x), context, attend)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """A transformer block on the grid's cells as tokens, between two 1×1 convolutions."""

    def __init__(self, channels: int, heads: int, context_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the UNet's resnets
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, heads, context_dim)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | KV, attend: Attend) -> Tensor:
        h, w = x.shape[-2:]

        def attend_on_grid(q, k, v, site):
            return attend(q, k, v, site._replace(hw=(h, w)))
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B,C,h,w) -> (B,N,C)
        # one copy here, where every layer below would make its own: 4 % of a forward on a CPU
        tokens = self.transformer_blocks[0](tokens.contiguous(), context, attend_on_grid)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, (h, w)))  # (B,N,C) -> (B,C,h,w)
