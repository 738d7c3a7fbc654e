"""How far apart two pictures are: SSIM, LPIPS, SIFID, CLIP similarity. Each a few lines on plain tensors.

LPIPS and SIFID read features of a trained trunk. Its weights come from a local safetensors file in torchvision's key
layout; widths are read off the shapes, so a small trunk in the same layout works as well.

References: SSIM, Wang et al. 2004; LPIPS, arXiv 1801.03924, version 0.1; SIFID, arXiv 1905.01164; CLIPScore,
arXiv 2104.08718. Shapes: B pairs, (B,3,H,W) RGB; functions give one number a pair, (B,).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ..common.problem import Problem
from ..loading.checkpoints import read_header

Weights = dict[str, Tensor]


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, in dB; inf for equal ones."""
    mse = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity: 11×11 Gaussian window of σ = 1.5 wherever it fits, K₁ = 0.01, K₂ = 0.03, biased moments.

    (B,C,H,W) in [-1,1] -> (B,), the mean over channels; 1 for equal pictures. Wang et al. define it for one channel:
    give RGB for the per-channel mean, `luma` of it for one grey channel. No side may be below 11 pixels. Computed on
    the CPU: Apple's GPUs have no float64.
    """
    rows = len(a)
    a, b = (((x + 1) * 127.5).flatten(0, 1)[:, None].cpu().double() for x in (a, b))  # (B·C,1,H,W) in 0..255
    taps = torch.exp(-torch.arange(-5, 6, dtype=torch.float64) ** 2 / (2 * 1.5**2))
    column = (taps / taps.sum()).view(1, 1, 11, 1)
    blur = lambda x: F.conv2d(F.conv2d(x, column), column.transpose(2, 3))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.view(rows, -1).mean(1)


def luma(x: Tensor) -> Tensor:
    """(B,3,H,W) -> (B,1,H,W), BT.601's weights."""
    return (x * torch.tensor((0.299, 0.587, 0.114), device=x.device, dtype=x.dtype).view(3, 1, 1)).sum(1, keepdim=True)


class Conv(NamedTuple):
    """A convolution and its ReLU: the number in torchvision's `features`, and how it moves."""

    number: int
    padding: int = 1
    stride: int = 1


POOL, TAP = "pool", "tap"
TRUNKS: dict[str, list[Conv | str]] = {  # torchvision's AlexNet and VGG16 up to the last activation that LPIPS taps
    "alex": [Conv(0, 2, 4), TAP, POOL, Conv(3, 2), TAP, POOL, Conv(6), TAP, Conv(8), TAP, Conv(10), TAP],
    "vgg": [Conv(0), Conv(2), TAP, POOL, Conv(5), Conv(7), TAP, POOL, Conv(10), Conv(12), Conv(14), TAP, POOL,
            Conv(17), Conv(19), Conv(21), TAP, POOL, Conv(24), Conv(26), Conv(28), TAP]}
POOLING = {"alex": 3, "vgg": 2}  # window; the stride is 2
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def lpips(a: Tensor, b: Tensor, kind: str, trunk: Weights, heads: Weights) -> Tensor:
    """Learned perceptual distance, version 0.1: Σ_l mean_hw( w_l · (f_l(a) - f_l(b))² ), each f_l of unit length over
    its channels. (B,3,H,W) in [-1,1] -> (B,); 0 for equal pictures. `kind` is "alex" or "vgg"."""
    shift, scale = (torch.tensor(c, device=a.device, dtype=a.dtype).view(1, 3, 1, 1) for c in (SHIFT, SCALE))
    distance = torch.zeros(len(a), device=a.device, dtype=a.dtype)
    pairs = zip(*(taps((x - shift) / scale, kind, trunk) for x in (a, b)))
    for level, (f, g) in enumerate(pairs):
        difference = (_unit(f) - _unit(g)) ** 2
        distance = distance + F.conv2d(difference, heads[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
    return distance


def taps(x: Tensor, kind: str, trunk: Weights) -> list[Tensor]:
    """The activations that LPIPS reads, finest first. `x` is shifted and scaled as the trunk expects."""
    found = []
    for layer in TRUNKS[kind]:
        if layer == TAP:
            found.append(x)
        elif not isinstance(layer, Conv):  # a pooling
            x = F.max_pool2d(x, POOLING[kind], stride=2)
        else:
            key = f"features.{layer.number}"
            x = F.relu(F.conv2d(x, trunk[f"{key}.weight"], trunk[f"{key}.bias"], layer.stride, layer.padding))
    return found


def _unit(f: Tensor) -> Tensor:
    return f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)


INCEPTION: list[Any] = [  # name, stride, padding
    ("Conv2d_1a_3x3", 2, 0), ("Conv2d_2a_3x3", 1, 0), ("Conv2d_2b_3x3", 1, 1), POOL,
    ("Conv2d_3b_1x1", 1, 0), ("Conv2d_4a_3x3", 1, 0)]


def inception_map(x: Tensor, inception: Weights) -> Tensor:
    """Inception-v3 before its second pooling, 192 channels. (B,3,H,W) in [-1,1], not resized -> (B,C,h,w)."""
    for layer in INCEPTION:
        if layer == POOL:
            x = F.max_pool2d(x, 3, stride=2)
            continue
        name, stride, padding = layer
        mean, var, weight, bias = (inception[f"{name}.bn.{part}"]
                                   for part in ("running_mean", "running_var", "weight", "bias"))
        x = F.conv2d(x, inception[f"{name}.conv.weight"], None, stride, padding)
        x = F.relu(F.batch_norm(x, mean, var, weight, bias, eps=0.001))
    return x


def sifid(a: Tensor, b: Tensor, inception: Weights) -> Tensor:
    """Single-image Fréchet distance: each picture's features, one sample a place, as a Gaussian. -> (B,)."""
    samples = [inception_map(x, inception).flatten(2).cpu().double() for x in (a, b)]  # (B,C,h·w)
    return torch.stack([frechet(f, g) for f, g in zip(*samples)])


def frechet(f: Tensor, g: Tensor) -> Tensor:
    """|μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 √(Σ₁Σ₂)) of two sets of samples, (C,n) and (C,m); covariances over n - 1.

    With Σ₁ = XᵀX and Σ₂ = YᵀY the root's trace is the sum of the singular values of XYᵀ: exact where a covariance is
    singular, too, which it is whenever there are fewer places than channels.
    """
    x, y = (((s - s.mean(1, keepdim=True)) / (s.shape[1] - 1) ** 0.5).T for s in (f, g))
    small_x, small_y = (torch.linalg.qr(s, mode="r").R for s in (x, y))  # at most C×C, with the same singular values
    cross = torch.linalg.matrix_norm(small_x @ small_y.T, "nuc")
    return (f.mean(1) - g.mean(1)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross


CAPTION = "A photo depicts {}"  # CLIPScore's prefix


def clip_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two CLIP embeddings, (B,P) each: CLIP-I of two pictures, CLIP-T of a picture and its text."""
    return F.cosine_similarity(a, b, dim=-1)


def clip_score(image: Tensor, caption: Tensor) -> Tensor:
    """2.5 · max(cos, 0) of a picture's embedding and that of its caption under the prefix `CAPTION`."""
    return 2.5 * clip_similarity(image, caption).clamp(min=0)


def trunk_keys(kind: str) -> list[str]:
    """What a weights file of this kind must hold: "alex", "vgg", "alex heads", "vgg heads", "inception"."""
    if kind == "inception":
        parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        return [f"{layer[0]}.{part}" for layer in INCEPTION if layer != POOL for part in parts]
    if kind.endswith("heads"):
        return [f"lin{level}.model.1.weight" for level in range(TRUNKS[kind.split()[0]].count(TAP))]
    return [f"features.{layer.number}.{part}" for layer in TRUNKS[kind] if isinstance(layer, Conv)
            for part in ("weight", "bias")]


def load_metric(path: str | Path, kind: str, device: torch.device | str = "cpu") -> Weights:
    """The tensors that a metric needs, in float32; the rest of the file is ignored. Raises Problem, naming a key
    that is missing."""
    path, keys = Path(path), trunk_keys(kind)
    missing = sorted(set(keys) - read_header(path).tensors.keys())
    if missing:
        raise Problem(f"{path}: is not {kind} weights for a metric, it has no {missing[0]}; see weights/README.md")
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).to(device, torch.float32) for key in keys}
