"""Smoothed energy guidance, arXiv 2408.00760; authors' code: SusungHong/SEG-SDXL.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/seg.py:SEG

    ε = ε_c + s (ε_c - ε̂_c) = ε̂_c + (1 + s) (ε_c - ε̂_c),    ε̂_c with SA(G_σ * Q, K, V) in the middle of the UNet

Queries blurred over the grid flatten the energy of attention; σ → ∞ gives every cell the mean query. Instead of the
unconditional row there is the blurred one (pag.py has both). The reference is not used.
"""

import torch
import torch.nn.functional as F

from isadca import Method
from isadca.loop import Guided

PLACES, SCALE, SIGMA = ("mid",), 3.0, 10.0  # where; s; σ in cells


def seg(controls):
    text, kernel = controls.conditions.text_kv[-1], controls.kernel

    def blurred(q, k, v, site):
        return kernel(blur(q, site.hw) if site.kind == "self" and site.place in PLACES else q, k, v, site)
    return [Guided(text, blurred, 0.0), Guided(text, kernel, 1 + SCALE)]


def blur(q, hw):
    """G_σ * q along both sides of the grid, mirrored at the edges and cut at 3σ or half the side. (B,H,N,d)."""
    x = q.transpose(-1, -2).unflatten(-1, hw).flatten(1, 2)           # (B,H·d,h,w)
    for _ in hw:
        reach = min(int(3 * SIGMA), x.shape[-1] // 2)
        g = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).to(x) / SIGMA) ** 2)
        x = F.pad(x, (reach, reach, 0, 0), "reflect").unfold(-1, len(g), 1) @ (g / g.sum())
        x = x.transpose(-1, -2)                                       # twice: as it was
    return x.flatten(2).unflatten(1, q.shape[1::2]).transpose(-1, -2)


SEG = Method("seg", mix=seg, init="random", ip_scale=0, source="SEG, arXiv 2408.00760; s = 3, the middle block")
