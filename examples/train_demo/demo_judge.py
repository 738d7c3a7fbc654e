"""The independent judge: a small convolutional classifier of noun, style, colour and pattern.

It shares nothing with the demo's CLIP. It is trained on the world's own pictures, blurred, noised and re-tinted, so
that a picture is judged by what it shows and not by how sharp it is.
"""

from collections.abc import Callable

import demo_world as world
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = {"noun": list(world.NOUNS), "style": list(world.STYLES), "colour": list(world.COLOURS),
         "pattern": list(world.PATTERNS)}


class Judge(nn.Module):
    """Pixels in [-1,1] (B,3,64,64) -> logits by attribute."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 192)):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip((3, *widths), widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in widths)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], len(words)) for name, words in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for conv, norm in zip(self.convs, self.norms):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)  # the backdrop is everywhere, the object is not
        return {name: head(pooled) for name, head in self.heads.items()}


def blemish(x: Tensor, rng: np.random.Generator) -> Tensor:
    """The faults of generated pictures: soft edges, noise, a tint."""
    if rng.random() < 0.5:
        side = int(rng.integers(24, 64))
        x = F.interpolate(F.interpolate(x, size=side, mode="area"), size=64, mode="bilinear")
    tint = torch.from_numpy(rng.normal(0, 0.04, (len(x), 3, 1, 1))).to(x)
    return x + tint + float(rng.uniform(0, 0.12)) * torch.randn_like(x)


def judge_loss(scenes: list, pixels: Callable[[np.ndarray], Tensor], batch: int):
    """The loss of a training step, as train_demo.fit wants it: cross-entropy over the four attributes."""
    answers = {name: np.array([words.index(getattr(s, name)) for s in scenes]) for name, words in HEADS.items()}

    def loss(net: nn.Module, rng: np.random.Generator) -> Tensor:
        index = rng.integers(len(scenes), size=batch)
        logits = net(blemish(pixels(index), rng))
        return sum(F.cross_entropy(logits[name].float(), torch.from_numpy(right[index]).to(logits[name].device))
                   for name, right in answers.items())
    return loss
