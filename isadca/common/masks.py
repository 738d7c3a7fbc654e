"""A part of the picture: masks, which are 1 inside it and 0 outside, at any size."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def masked(f: Callable, g: Callable, mask: Tensor) -> Callable:
    """Of two `attend` functions, f where the mask is 1, g where it is 0, between them a mix. The mask is (h,w), or
    (N,h,w) for the variations of one batch."""
    def attend_masked(q, k, v, site):
        weight = at_grid(mask, site.hw, q).flatten(2).transpose(1, 2)[:, None]  # (N,1,h·w,1)
        weight = weight.repeat(len(q) // len(weight), 1, 1, 1)                  # every half has N rows
        return torch.lerp(g(q, k, v, site), f(q, k, v, site), weight)
    return attend_masked


def at_grid(mask: Tensor, hw: Sequence[int], like: Tensor) -> Tensor:
    """A mask (h,w) or (N,h,w) at another grid, each cell the mean of what it covers: (1 or N,1,*hw)."""
    mask = mask[None] if mask.ndim == 2 else mask
    return F.interpolate(mask[:, None].to(like), size=tuple(hw), mode="area")
