"""Which metrics there are, which weights each reads, and the judge that measures a variation by them. The formulas are
in metrics.py."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from ..common.images import to_tensor
from ..common.problem import Problem
from .clip_pair import CLIPPair, load_clip
from .metrics import CAPTION, clip_score, clip_similarity, load_metric, lpips, luma, sifid, ssim

# name -> its heading in the table, whether higher is better, and its files in the metrics folder
METRICS = {"lpips-alex": ("LPIPS (alex)", False, ("alex.safetensors", "lpips-alex.safetensors")),
           "lpips-vgg": ("LPIPS (vgg)", False, ("vgg.safetensors", "lpips-vgg.safetensors")),
           "ssim": ("SSIM (RGB)", True, ()),
           "ssim-luma": ("SSIM (luma)", True, ()),
           "sifid": ("SIFID", False, ("inception.safetensors",)),
           "clip-i": ("CLIP-I", True, ("clip",)),
           "clip-t": ("CLIP-T", True, ("clip",)),
           "clipscore": ("CLIPScore", True, ("clip",))}


def metric_lacks(metric: str, folder: Path) -> str:
    """Why a metric cannot be had; empty where it can."""
    return next((f"{folder / file}: no such file" for file in METRICS[metric][2] if not (folder / file).exists()), "")


class Judge:
    """The metrics asked for, with the weights that they share loaded once. Raises Problem for an unknown name and,
    naming the file, for weights that are missing."""

    def __init__(self, names: tuple[str, ...], folder: Path, device: torch.device | str = "cpu"):
        self.names, self.device = names, device
        for name in names:
            if name not in METRICS:
                raise Problem(f"metric is {name!r}, expected one of {', '.join(METRICS)}")
            if why := metric_lacks(name, folder):
                raise Problem(f"{why}, which the metric {name} needs; see weights/README.md for where people get it, "
                              "or leave it out of --metrics")
        self._distances: dict[str, Callable] = {}
        for kind in ("alex", "vgg"):
            if f"lpips-{kind}" in names:
                trunk, heads = (load_metric(folder / file, what, device)
                                for file, what in zip(METRICS[f"lpips-{kind}"][2], (kind, f"{kind} heads")))
                self._distances[f"lpips-{kind}"] = partial(lpips, kind=kind, trunk=trunk, heads=heads)
        if "ssim" in names:
            self._distances["ssim"] = ssim
        if "ssim-luma" in names:
            self._distances["ssim-luma"] = lambda a, b: ssim(luma(a), luma(b))
        if "sifid" in names:
            inception = load_metric(folder / "inception.safetensors", "inception", device)
            self._distances["sifid"] = partial(sifid, inception=inception)
        wants_clip = any(METRICS[name][2] == ("clip",) for name in names)
        self._clip = load_clip(folder / "clip", device) if wants_clip else None

    def __call__(self, variation: Image.Image, reference: Image.Image, prompt: str) -> dict[str, float]:
        """The number of each metric. Raises Problem where one is not a number."""
        a, b = (to_tensor(picture).to(self.device) for picture in (variation, reference))
        numbers = {name: distance(a, b).item() for name, distance in self._distances.items()}
        if self._clip:
            numbers |= clip_numbers(self._clip, variation, reference, prompt)
        for name in self.names:
            if not math.isfinite(numbers[name]):
                raise Problem(f"metric {name} gives {numbers[name]} for {prompt[:60]!r}; its weights are damaged: get "
                              "them again, or leave it out of --metrics")
        return {name: numbers[name] for name in self.names}


def clip_numbers(clip: CLIPPair, variation: Image.Image, reference: Image.Image, prompt: str) -> dict[str, float]:
    """What "CLIP similarity" may mean. The paper does not say which it reports."""
    picture, text = clip.embed_picture(variation), clip.embed_text(prompt)
    return {"clip-i": clip_similarity(picture, clip.embed_picture(reference)).item(),
            "clip-t": clip_similarity(picture, text).item(),
            "clipscore": clip_score(picture, clip.embed_text(CAPTION.format(prompt))).item()}
