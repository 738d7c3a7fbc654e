"""IP-Adapter's projections of patch states, the encoder's hidden states before its last layer: those of the plus,
plus-face and full-face files. Attribute names are the files' keys.

Reference: Perceiver resampler, arXiv 2204.14198. Shapes: as in ip_adapter.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend
from .layers import merge_heads, split_heads


class MLPProjection(nn.Module):
    """full-face. (R,L,W) -> (R,L,D)."""

    def __init__(self, width: int, context_dim: int):
        super().__init__()
        self.proj = nn.ModuleDict({"0": nn.Linear(width, width), "2": nn.Linear(width, context_dim),
                                   "3": nn.LayerNorm(context_dim)})

    def forward(self, x: Tensor) -> Tensor:
        return self.proj["3"](self.proj["2"](F.gelu(self.proj["0"](x))))


class PerceiverAttention(nn.Module):
    """Queries from the latents; keys and values from the image and the latents."""

    HEAD_DIM = 64  # no shape tells it; the same in every published file

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.heads = inner // self.HEAD_DIM
        self.norm1 = nn.LayerNorm(dim)  # of the image
        self.norm2 = nn.LayerNorm(dim)  # of the latents
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(latents), k, v))
        return self.to_out(merge_heads(attend(q, k, v)))


class Resampler(nn.Module):
    """plus, plus-face. (R,L,W) -> (R,n,D). `shapes` are those of the file's `image_proj`."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        _, tokens, dim = shapes["latents"]
        width, context_dim = shapes["proj_in.weight"][1], shapes["norm_out.weight"][0]
        inner, hidden = shapes["layers.0.0.to_q.weight"][0], shapes["layers.0.1.1.weight"][0]
        depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
        self.latents = nn.Parameter(torch.zeros(1, tokens, dim))
        self.proj_in = nn.Linear(width, dim)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            mlp = nn.ModuleDict({"0": nn.LayerNorm(dim), "1": nn.Linear(dim, hidden, bias=False),
                                 "3": nn.Linear(hidden, dim, bias=False)})
            self.layers.append(nn.ModuleList([PerceiverAttention(dim, inner), mlp]))
        self.proj_out = nn.Linear(dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for attention, mlp in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + mlp["3"](F.gelu(mlp["1"](mlp["0"](latents))))
        return self.norm_out(self.proj_out(latents))


def patch_projection(shapes: dict[str, tuple[int, ...]]) -> tuple[nn.Module, int, int]:
    """The projection of patch states that `shapes` describe, the width it reads and the context width it writes."""
    if "proj.3.weight" in shapes:
        context_dim, width = shapes["proj.2.weight"]
        return MLPProjection(width, context_dim), width, context_dim
    return Resampler(shapes), shapes["proj_in.weight"][1], shapes["norm_out.weight"][0]
