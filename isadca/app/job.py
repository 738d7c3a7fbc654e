"""What a command has to do, as its user sees it: the line before the work, and one bar for all of it."""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ..loading.load import default_weights
from ..methods import Method
from ..networks.model import Model
from .console import say

BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
LARGE = 256  # pixels a side from which a CPU takes minutes a picture


class Job:
    """Inversions and samplings that are still to come; `methods` are those of one sampling."""

    def __init__(self, args: Namespace, methods: Sequence[Method], refs: int, samplings: int):
        self.quiet, self.fixed_point, self.n = args.quiet, getattr(args, "fixed_point", 0), getattr(args, "n", 1)
        self.rows_at_once = getattr(args, "rows_at_once", 1)
        self.rows = sum(map(rows_a_step, methods)) * self.n  # of the UNet in a step of sampling
        self.to_come = {"inverting": refs, "sampling": samplings}
        self.pictures = samplings * len(methods) * self.n
        self.steps = 0
        self.bar: tqdm | None = None

    def begin(self, model: Model, weights: Path, size: tuple[int, int], steps: int) -> None:
        """Before the first work of a reference. What is to come is said once."""
        if not self.steps and not self.quiet:
            name = "the demo (64×64 emoji; for photos: isadca fetch)" if is_demo(weights) else str(weights)
            many = f", {self.pictures} picture{'s' * (self.pictures > 1)}" if self.pictures else ""
            largest = max(1, min(self.rows, self.rows_at_once))  # rows of one call of the UNet
            line = (f"{name} on {model.device} in {str(model.dtype).removeprefix('torch.')}: {size[0]}×{size[1]}, "
                    f"{steps} step{'s' * (steps > 1)}{many}, about {memory(model, size, largest):.1f} GB")
            if model.device.type == "cpu" and max(size) >= LARGE:
                line += "; on a CPU this is for checking, a GPU (--device cuda) is far faster"
            say(line)
        self.steps = steps

    def progress(self, items: list, label: str) -> Iterator:
        """One bar for all that is to come. It counts rows of the UNet, so that the time left is about right."""
        rows = {"inverting": 1 + self.fixed_point, "sampling": 1 + self.rows}
        self.to_come[label] = max(0, self.to_come.get(label, 0) - 1)
        ahead = sum(self.steps * rows[name] * times for name, times in self.to_come.items() if times)
        bar = self.bar or tqdm(disable=self.quiet, file=sys.stderr, bar_format=BAR)
        bar.disable, bar.total = self.quiet, bar.n + len(items) * rows.get(label, 1) + ahead
        self.bar = None
        try:
            bar.set_description(label)
            for item in items:
                yield item
                bar.update(rows.get(label, 1))
            self.bar = bar if ahead else None  # it goes on
        finally:  # also where the work was interrupted
            if self.bar:
                bar.clear()
                bar.disable = True  # it draws nothing in the meantime, not even at the program's end
            else:
                bar.close()


def is_demo(weights: Path) -> bool:
    return weights.resolve() == default_weights().resolve()


def strange_words(model: Model, prompt: str) -> list[str]:
    """The words that the demo's world lacks: its tokenizer has each of its own as one token."""
    return list(dict.fromkeys(word for word, rows in model.tokenizer.words(prompt) if len(rows) > 1))


def rows_a_step(method: Method) -> int:
    """Rows of the UNet that a step of one picture takes: one for each guidance half and branch."""
    branches = 2 if method.mix == "noise" and method.lam not in (0, 1) else 1
    return branches * (1 if method.guidance == 1 else 2)


def memory(model: Model, size: tuple[int, int], rows: int) -> float:
    """GB, roughly: torch itself, the weights, and the UNet's rows or the VAE's picture, whichever is more.

    A row holds the skips of its way down and the widest feed-forward (12 times its channels); the replay, the keys and
    values of five steps; the VAE, three activations of its second level at the picture's full size. A process was
    measured to hold twice that, since the allocator keeps what is freed.
    """
    networks = [model.unet, model.vae, model.text, *filter(None, (model.vision, model.ip_adapter))]
    weights = sum(w.numel() * w.element_size() for network in networks for w in network.parameters())
    pixels, unet, vae = size[0] * size[1], model.unet.config, model.vae.config
    cells = pixels / vae.downscale**2
    a_layer = sum(c / 4**i for i, c in enumerate(unet.channels))  # values per cell, one activation of each level
    layers = unet.layers_per_block + 1
    in_unet = cells * (rows * (layers * a_layer + 12 * unet.channels[0]) + 5 * 4 * layers * a_layer)
    in_vae = pixels * 3 * vae.channels[1]
    at_once = max(in_unet * model.dtype.itemsize, in_vae * model.vae_dtype.itemsize)
    return 0.25 + (weights + 2 * at_once) / 1e9
