"""The heart of the repository: one seam, `attend(q, k, v, site) -> y`, and everything that passes through it.

Every attention layer of the UNet projects q, k, v and then calls the `attend` function it was given. The plain
kernels are such functions; ISA, DCA and blends are small factories that return one. To try an idea, write another.

References: the paper, Eqs. 5, 6, 8; RIVAL, arXiv 2305.18729; IP-Adapter, arXiv 2308.06721; MasaCtrl, arXiv 2304.08465.
Shapes: B rows of the batch, H heads, N queries, M keys, d head dim. q is (B,H,N,d), k and v are (B,H,M,d).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Site(NamedTuple):
    """Which attention layer is calling."""

    name: str                     # its checkpoint prefix: "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
    kind: str                     # "self" | "cross"
    place: str                    # "down" | "mid" | "up"
    layer: int                    # transformer block in EXECUTION order; SD1.5: 0..5 down, 6 mid, 7..15 up
    hw: tuple[int, int] = (0, 0)  # grid of the queries, N = h * w


Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]
KV = dict[str, tuple[Tensor, Tensor]]  # extra keys and values by site name, each (R,H,M,d)


# ---- kernels -------------------------------------------------------------------------------------------------

def attention_probs(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """softmax(QKᵀ/√d): how much each query looks at each key. (B,H,N,d), (B,H,M,d) -> (B,H,N,M)."""
    wide = torch.promote_types(q.dtype, torch.float32)  # half precision overflows, and its sums lose the tail
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(dim=-1).to(q.dtype)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, site: Site | None = None,
                     causal: bool = False) -> Tensor:
    """Eq. 6 written out: softmax(QKᵀ/√d) V. It holds the (B,H,N,M) matrix: for reading and for tests."""
    return attention_probs(q, k, causal) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, site: Site | None = None, causal: bool = False) -> Tensor:
    """The same from torch's fused kernel; the default everywhere."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


# ---- variants: factories that return an Attend. `kernel` is what they call in the end --------------------------

def capture(store: KV, kernel: Attend = attend, maps: KV | None = None) -> Attend:
    """Plain attention that leaves every self-attention's keys and values in `store`, and every layer's queries and
    keys, which its attention map can be computed from, in `maps`."""
    def attend_capture(q, k, v, site):
        if maps is not None:
            maps[site.name] = (q, k)
        if site.kind == "self":
            store[site.name] = (k, v)
        return kernel(q, k, v, site)
    return attend_capture


def isa(ref_kv: KV, mode: str = "append", kernel: Attend = attend) -> Attend:
    """Intra-image self-attention, Eq. 5: queries from z_t, keys and values from z̄_t ⊕ z_t.

    ⊕ joins tokens: K and V have the reference's M tokens, then z_t's own. mode="replace" keeps the reference's
    alone (RIVAL's early phase, MasaCtrl). `ref_kv` is what `capture` stored in a pass over z̄_t, with one row, one
    per guidance half, or one per row of q. Cross-attention passes through.
    """
    if mode not in ("append", "replace"):
        raise ValueError(f"isa mode is {mode!r}, expected 'append' or 'replace'")

    def attend_isa(q, k, v, site):
        if site.kind != "self":
            return kernel(q, k, v, site)
        k_ref, v_ref = (repeat_rows(x, len(q)) for x in ref_kv[site.name])
        if mode == "replace":
            return kernel(q, k_ref, v_ref, site)
        return kernel(q, torch.cat([k_ref, k], dim=2), torch.cat([v_ref, v], dim=2), site)
    return attend_isa


def dca(ip_kv: KV, scale: float | Tensor = 1.0, kernel: Attend = attend) -> Attend:
    """Decoupled cross-attention, Eq. 8: attention to the text plus `scale` × attention to the image.

    `ip_kv` comes from `IPAdapter.keys_values`, with rows as in `isa`; if it is empty, only the text is attended to.
    Self-attention passes through.
    """
    def attend_dca(q, k, v, site):
        text = kernel(q, k, v, site)
        if site.kind != "cross" or scale == 0 or not ip_kv:
            return text
        k_ip, v_ip = (repeat_rows(x, len(q)) for x in ip_kv[site.name])
        return text + scale * kernel(q, k_ip, v_ip, site)
    return attend_dca


# ---- combinators -----------------------------------------------------------------------------------------------

def blend(f: Attend, g: Attend, weight: float | Tensor) -> Attend:
    """(1 - weight) · f + weight · g, exactly f at 0 and exactly g at 1 (the other is then not computed)."""
    if weight in (0, 1):
        return g if weight else f
    return lambda q, k, v, site: torch.lerp(f(q, k, v, site), g(q, k, v, site), weight)


def where(condition: Callable[[Site], bool], f: Attend, g: Attend = attend) -> Attend:
    """f at the sites that satisfy `condition`, g at the others: `where(lambda s: s.layer >= 10, isa(ref_kv))`."""
    return lambda q, k, v, site: (f if condition(site) else g)(q, k, v, site)


def in_layers(layers: tuple[int, ...] | None, f: Attend, g: Attend) -> Attend:
    """f in these transformer blocks, g in the others; None is all blocks."""
    return f if layers is None else where(lambda site: site.layer in layers, f, g)


def by_kind(on_self: Attend, on_cross: Attend) -> Attend:
    """One function for self-attention, another for cross-attention."""
    return where(lambda site: site.kind == "self", on_self, on_cross)


def by_rows(n: int, f: Attend, g: Attend) -> Attend:
    """f for the first n rows of the batch, g for the rest: two systems in one pass of the network."""
    def attend_by_rows(q, k, v, site):
        return torch.cat([f(q[:n], k[:n], v[:n], site), g(q[n:], k[n:], v[n:], site)])
    return attend_by_rows


def joined(kvs: Sequence[KV], dim: int) -> KV:
    """Several sets of keys and values as one: all their rows (dim 0), or all their tokens in each row (dim 2)."""
    return {name: (torch.cat([kv[name][0] for kv in kvs], dim), torch.cat([kv[name][1] for kv in kvs], dim))
            for name in kvs[0]}


def rows_of(kv: KV, rows: slice) -> KV:
    return {name: (k[rows], v[rows]) for name, (k, v) in kv.items()}


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """(R,...) -> (rows,...), each of the R rows standing for rows/R neighbours.

    Raises ValueError where R does not divide rows: leaving the reference out in silence is how such code goes wrong.
    """
    if len(x) == rows:
        return x
    if len(x) == 1:
        return x.expand(rows, *x.shape[1:])  # no copy
    if rows % len(x):
        raise ValueError(f"extra keys have {len(x)} rows, the queries {rows}; expected 1, one per guidance half, "
                         "or one per row")
    return x.repeat_interleave(rows // len(x), dim=0)
