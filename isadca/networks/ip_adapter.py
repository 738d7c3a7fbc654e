"""IP-Adapter: an image embedding becomes a few context tokens, and each cross-attention gets a second K', V'.

Attribute names are the published files' keys. The three families differ in `image_proj` alone:

    base, light, vit-G     Linear + LayerNorm on the global embedding      4 tokens
    plus, plus-face        Perceiver resampler on the patch states         16 tokens      patch_projections.py
    full-face              MLP on the patch states                         257 tokens     patch_projections.py

Reference: IP-Adapter, arXiv 2308.06721.
Shapes: R rows, P embedding width, L patches + 1, W encoder width, n tokens, D context width, H heads.
"""

import torch
from torch import Tensor, nn

from ..attention import KV, Site
from .layers import split_heads


class ImageProjection(nn.Module):
    """base, light, vit-G. (R,P) -> (R,n,D)."""

    def __init__(self, embed_dim: int, context_dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(embed_dim, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (self.tokens, -1)))


class KeyValueIP(nn.Module):
    def __init__(self, context_dim: int, dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)


class IPAdapter(nn.Module):
    """One published file: `image_proj.*` and `ip_adapter.{1,3,5,...}.to_{k,v}_ip`, sizes read off its shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        own = {key.removeprefix("image_proj."): shape for key, shape in shapes.items() if key.startswith("image_proj.")}
        self.reads_patches = "norm.weight" not in own  # plus and full-face
        if self.reads_patches:
            from .patch_projections import patch_projection
            self.image_proj, self.embed_dim, self.context_dim = patch_projection(own)
        else:
            (rows, self.embed_dim), [self.context_dim] = own["proj.weight"], own["norm.weight"]
            self.image_proj = ImageProjection(self.embed_dim, self.context_dim, rows // self.context_dim)
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

        They do not depend on t, and are computed once per image. `sites` are the UNet's.
        """
        pairs = {site.name: self.ip_adapter[number] for number, site in numbered(sites).items()}
        return {name: (split_heads(p.to_k_ip(tokens), heads), split_heads(p.to_v_ip(tokens), heads))
                for name, p in pairs.items()}


def numbered(sites: list[Site]) -> dict[str, Site]:
    """The cross-attentions under the files' numbers "1", "3", "5", ...: in the order in which diffusers registers
    them, down, up, mid, where `sites` are in the order of execution."""
    cross = sorted((s for s in sites if s.kind == "cross"), key=lambda s: s.place == "mid")  # stable: mid goes last
    return {str(2 * i + 1): site for i, site in enumerate(cross)}
