"""IP-Adapter: an image embedding becomes a few context tokens, and each cross-attention gets a second K', V'.

Attribute names are the published files' keys. The three families differ in `image_proj` alone:

    base, light, vit-G     Linear + LayerNorm on the global embedding      4 tokens
    plus, plus-face        Perceiver resampler on the patch states         16 tokens
    full-face              MLP on the patch states                         257 tokens

References: IP-Adapter, arXiv 2308.06721; Perceiver resampler, arXiv 2204.14198.
Shapes: R rows, P embedding width, L patches + 1, W encoder width, n tokens, D context width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import KV, Site, attend
from .layers import merge_heads, split_heads


class ImageProjection(nn.Module):
    """base, light, vit-G. (R,P) -> (R,n,D)."""

    def __init__(self, embed_dim: int, context_dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(embed_dim, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (self.tokens, -1)))


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


def perceiver_mlp(dim: int, hidden: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": nn.LayerNorm(dim), "1": nn.Linear(dim, hidden, bias=False),
                          "3": nn.Linear(hidden, dim, bias=False)})


class Resampler(nn.Module):
    """plus, plus-face. (R,L,W) -> (R,n,D)."""

    def __init__(self, width: int, dim: int, inner: int, hidden: int, depth: int, tokens: int, context_dim: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, tokens, dim))
        self.proj_in = nn.Linear(width, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, inner), perceiver_mlp(dim, hidden)]) for _ in range(depth))
        self.proj_out = nn.Linear(dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for attention, mlp in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + mlp["3"](F.gelu(mlp["1"](mlp["0"](latents))))
        return self.norm_out(self.proj_out(latents))


class KeyValueIP(nn.Module):
    def __init__(self, context_dim: int, dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)


class IPAdapter(nn.Module):
    """One published file: `image_proj.*` and `ip_adapter.{1,3,5,...}.to_{k,v}_ip`, sizes read off its shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self.reads_patches = "image_proj.norm.weight" not in shapes  # plus and full-face
        self.image_proj, self.embed_dim, self.context_dim = _image_proj(shapes)
        numbers = sorted({int(key.split(".")[1]) for key in shapes if key.startswith("ip_adapter.")})
        self.ip_adapter = nn.ModuleDict(
            {str(n): KeyValueIP(self.context_dim, shapes[f"ip_adapter.{n}.to_k_ip.weight"][0]) for n in numbers})

    def tokens(self, embeds: Tensor, unconditional: Tensor) -> Tensor:
        """Image tokens for both guidance halves, [unconditional, image]. Two (1,...) inputs -> (2,n,D).

        The unconditional input is what the adapter was trained to see in place of "no image": a zero embedding
        (base), or the encoder's patch states of an all-zero, mean-grey input (plus, full-face).
        """
        return self.image_proj(torch.cat([unconditional, embeds]))

    def keys_values(self, tokens: Tensor, sites: list[Site], heads: int) -> KV:
        """Eq. 7's image half: K' = W'_K(c_i), V' = W'_V(c_i) for each cross-attention, by site name.

        They do not depend on t: once per image. `sites` are the UNet's.
        """
        pairs = {site.name: self.ip_adapter[number] for number, site in numbered(sites).items()}
        return {name: (split_heads(p.to_k_ip(tokens), heads), split_heads(p.to_v_ip(tokens), heads))
                for name, p in pairs.items()}


def numbered(sites: list[Site]) -> dict[str, Site]:
    """The cross-attentions under the files' numbers "1", "3", "5", ...: in the order in which diffusers registers
    them, down, up, mid, where `sites` are in the order of execution."""
    cross = sorted((s for s in sites if s.kind == "cross"), key=lambda s: s.place == "mid")  # stable: mid goes last
    return {str(2 * i + 1): site for i, site in enumerate(cross)}


def _image_proj(shapes: dict[str, tuple[int, ...]]) -> tuple[nn.Module, int, int]:
    """The projection that a file's shapes describe, the width it reads and the context width it writes."""
    s = {key.removeprefix("image_proj."): shape for key, shape in shapes.items()}
    if "norm.weight" in s:
        rows, embed_dim = s["proj.weight"]
        context_dim = s["norm.weight"][0]
        return ImageProjection(embed_dim, context_dim, rows // context_dim), embed_dim, context_dim
    if "proj.3.weight" in s:
        context_dim, width = s["proj.2.weight"]
        return MLPProjection(width, context_dim), width, context_dim
    depth = 1 + max(int(key.split(".")[1]) for key in s if key.startswith("layers."))
    _, tokens, dim = s["latents"]
    width, context_dim = s["proj_in.weight"][1], s["norm_out.weight"][0]
    return (Resampler(width, dim, s["layers.0.0.to_q.weight"][0], s["layers.0.1.1.weight"][0], depth, tokens,
                      context_dim), width, context_dim)
