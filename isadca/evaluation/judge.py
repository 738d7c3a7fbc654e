"""Which metrics there are, which weights each reads, and the judge that applies the formulas of metrics.py."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..common.images import clip_pixels, to_tensor
from ..common.problem import Problem
from ..loading.checkpoints import load_into
from ..loading.load import build, default_weights, find_part, tokenizer_of
from ..networks.clip import CLIPText, CLIPVision
from ..networks.tokenizer import Tokenizer
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
    """Why a metric is not available; empty if it is."""
    return next((f"{folder / file}: no such file" for file in METRICS[metric][2] if not (folder / file).exists()), "")


class CLIPPair(NamedTuple):
    text: CLIPText | None
    vision: CLIPVision
    tokenizer: Tokenizer

    def embed_text(self, text: str) -> Tensor:
        """-> (1,P)"""
        return self.text.embed(self.tokenizer([text]).to(self._weight.device))

    def embed_picture(self, picture: Image.Image) -> Tensor:
        """-> (1,P)"""
        return self.vision(clip_pixels(picture, self.vision.config.image_size).to(self._weight))[0]

    @property
    def _weight(self) -> Tensor:
        return next(self.vision.parameters())


def load_clip(folder: str | Path, device: torch.device | str = "cpu") -> CLIPPair:
    """Both halves from one file, as openai/clip-vit-large-patch14 publishes them; float32.

    Without a config.json it has to be that one: shapes do not tell the number of heads or the activation. The
    vocabulary is the folder's, or CLIP's own."""
    folder = Path(folder)
    text, vision = (find_part(folder, kind, torch.float32) for kind in ("text", "vision"))
    if "text_projection.weight" not in text.shapes:
        raise Problem(f"{text.path}: its texts and pictures are not embedded in one space; the metrics take a "
                      "whole CLIP, such as openai/clip-vit-large-patch14")
    text_net, vision_net = (load_into(build(part), part, torch.float32, device) for part in (text, vision))
    own = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    words = tokenizer_of(folder if own else default_weights().parent / "tokenizer", text_net.config)
    return CLIPPair(text_net, vision_net, words)


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
        self._distances: dict[str, Callable] = {"ssim": ssim, "ssim-luma": lambda a, b: ssim(luma(a), luma(b))}
        for kind in ("alex", "vgg"):
            if f"lpips-{kind}" in names:
                trunk, heads = (load_metric(folder / file, what, device)
                                for file, what in zip(METRICS[f"lpips-{kind}"][2], (kind, f"{kind} heads")))
                self._distances[f"lpips-{kind}"] = partial(lpips, kind=kind, trunk=trunk, heads=heads)
        if "sifid" in names:
            inception = load_metric(folder / "inception.safetensors", "inception", device)
            self._distances["sifid"] = partial(sifid, inception=inception)
        wants_clip = any(METRICS[name][2] == ("clip",) for name in names)
        self._clip = load_clip(folder / "clip", device) if wants_clip else None

    def __call__(self, variation: Image.Image, reference: Image.Image, prompt: str) -> dict[str, float]:
        """The number of each metric. Raises Problem where one is not a number."""
        a, b = (to_tensor(picture).to(self.device) for picture in (variation, reference))
        numbers = {name: self._distances[name](a, b).item() for name in self.names if name in self._distances}
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
