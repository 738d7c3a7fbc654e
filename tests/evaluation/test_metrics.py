"""The metrics against scikit-image, SciPy and modules built the way torchvision builds them; and their identities."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from scipy import linalg
from skimage.metrics import structural_similarity
from torch import nn

import isadca
from isadca.common.images import to_tensor
from isadca.common.problem import Problem
from isadca.evaluation import metrics


def pictures(n: int = 3, size: tuple[int, int] = (64, 64), seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in [-1,1]: noise alone would make every SSIM zero."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (n, 3, 8, 8)))
    x = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(-1, 1)
    return (x + torch.from_numpy(rng.normal(0, 0.1, x.shape))).clamp(-1, 1).float()


# ---- SSIM ------------------------------------------------------------------------------------------------------

def skimage_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """One channel, as Wang et al. define it: no padding, so the map's border is cut off."""
    x, y = (((p.double() + 1) * 127.5).numpy() for p in (a, b))
    _, full = structural_similarity(x, y, data_range=255, gaussian_weights=True, sigma=1.5, full=True,
                                    use_sample_covariance=False)
    return full[5:-5, 5:-5].mean()


@pytest.mark.parametrize("size", [(64, 64), (11, 11), (40, 23)])
def test_ssim_equals_scikit_image(size):
    a, b = pictures(3, size), pictures(3, size, seed=1)
    b = 0.7 * a + 0.3 * b
    expected = [np.mean([skimage_ssim(x, y) for x, y in zip(p, q)]) for p, q in zip(a, b)]
    np.testing.assert_allclose(metrics.ssim(a, b).numpy(), expected, rtol=1e-6)
    grey = [skimage_ssim(p[0], q[0]) for p, q in zip(metrics.luma(a), metrics.luma(b))]
    np.testing.assert_allclose(metrics.ssim(metrics.luma(a), metrics.luma(b)).numpy(), grey, rtol=1e-6)


def test_ssim_of_dark_and_nearly_flat_pictures_is_scikit_images():
    """Where its two constants decide."""
    a, b = (-0.99 + 0.01 * pictures(2, seed=seed) for seed in (0, 1))
    expected = [np.mean([skimage_ssim(x, y) for x, y in zip(p, q)]) for p, q in zip(a, b)]
    np.testing.assert_allclose(metrics.ssim(a, b).numpy(), expected, rtol=1e-6)


def test_luma_is_pillows():
    picture = isadca.load_image(ROOT / "examples" / "cat.png")
    ours = (metrics.luma(to_tensor(picture))[0, 0] + 1) * 127.5
    np.testing.assert_allclose(ours.numpy(), np.asarray(picture.convert("L")), atol=0.51)


# ---- LPIPS -----------------------------------------------------------------------------------------------------

def torchvision_features(kind: str, divide: int = 8) -> nn.Sequential:
    """The `features` of torchvision's models with every width divided: layers and numbers are the published ones."""
    layers, c = [], 3
    plan = {"alex": [(64, 11, 4, 2), "M3", (192, 5, 1, 2), "M3", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
            "vgg": [(w, 3, 1, 1) if w else "M2" for w in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0,
                                                          512, 512, 512)]}[kind]
    for step in plan:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(int(step[1]), 2))
        else:
            width, k, stride, padding = step
            layers += [nn.Conv2d(c, width // divide, k, stride, padding), nn.ReLU()]
            c = width // divide
    return nn.Sequential(*layers)


CUTS = {"alex": [2, 5, 8, 10, 12], "vgg": [4, 9, 16, 23, 30]}  # as the lpips package slices `features`


def lpips_parts(kind: str) -> tuple[nn.Sequential, dict, dict]:
    torch.manual_seed(0)
    features = torchvision_features(kind)
    widths = [[m for m in features[:cut] if isinstance(m, nn.Conv2d)][-1].out_channels for cut in CUTS[kind]]
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(widths)}
    return features, {f"features.{k}": v for k, v in features.state_dict().items()}, heads


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_equals_its_definition(kind):
    """Written out in NumPy on the taps of modules that are numbered as torchvision's."""
    features, trunk, heads = lpips_parts(kind)
    a, b = pictures(2, (64, 96)), pictures(2, (64, 96), seed=1)

    def taps(x):
        x = (x - torch.tensor([-.030, -.088, -.188]).view(3, 1, 1)) / torch.tensor([.458, .448, .450]).view(3, 1, 1)
        found = [features[:cut](x).detach().double().numpy() for cut in CUTS[kind]]
        return [f / (np.sqrt((f**2).sum(1, keepdims=True)) + 1e-10) for f in found]

    expected = sum((head.double().numpy() * (f - g) ** 2).sum(1).mean((1, 2))
                   for f, g, head in zip(taps(a), taps(b), heads.values()))
    np.testing.assert_allclose(metrics.lpips(a, b, kind, trunk, heads).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_a_distance_and_has_a_gradient(kind):
    _, trunk, heads = lpips_parts(kind)
    a, b = pictures(2).requires_grad_(), pictures(2, seed=1)
    assert metrics.lpips(a, a.detach(), kind, trunk, heads).abs().max() == 0
    there, back = metrics.lpips(a, b, kind, trunk, heads), metrics.lpips(b, a, kind, trunk, heads)
    assert (there > 0).all() and torch.allclose(there, back)
    there.sum().backward()
    assert a.grad.abs().max() > 0


# ---- SIFID -----------------------------------------------------------------------------------------------------

def inception_weights(divide: int = 16) -> dict:
    torch.manual_seed(0)
    weights, c = {}, 3
    for name, width, k in (("1a_3x3", 32, 3), ("2a_3x3", 32, 3), ("2b_3x3", 64, 3), ("3b_1x1", 80, 1),
                           ("4a_3x3", 192, 3)):
        width = width // divide
        kernel = torch.randn(width, c, k, k)
        weights[f"Conv2d_{name}.conv.weight"] = kernel - kernel.mean((1, 2, 3), keepdim=True)  # no dead channel
        for part, value in (("weight", 1), ("bias", 1), ("running_mean", 0), ("running_var", 1)):
            weights[f"Conv2d_{name}.bn.{part}"] = value + 0.1 * torch.rand(width)
        c = width
    return weights


def block(weights: dict, name: str, stride: int = 1, padding: int = 0) -> nn.Sequential:
    """torchvision's BasicConv2d."""
    kernel = weights[f"Conv2d_{name}.conv.weight"]
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride, padding, bias=False)
    norm = nn.BatchNorm2d(len(kernel), eps=0.001)
    conv.load_state_dict({"weight": kernel})
    norm.load_state_dict({part: weights[f"Conv2d_{name}.bn.{part}"]
                          for part in ("weight", "bias", "running_mean", "running_var")}, strict=False)
    return nn.Sequential(conv, norm.eval(), nn.ReLU())


def test_sifid_equals_scipys():
    """Features from modules; mean and np.cov over the places; the matrix root by Schur decomposition."""
    weights = inception_weights()
    net = nn.Sequential(block(weights, "1a_3x3", stride=2), block(weights, "2a_3x3"),
                        block(weights, "2b_3x3", padding=1), nn.MaxPool2d(3, 2), block(weights, "3b_1x1"),
                        block(weights, "4a_3x3"))
    a, b = pictures(2, (64, 96)), pictures(2, (64, 96), seed=1)
    expected = []
    for x, y in zip(a, b):
        f, g = (net(p[None])[0].flatten(1).double().detach().numpy() for p in (x, y))
        s, t = np.cov(f), np.cov(g)
        assert np.linalg.matrix_rank(s @ t) == len(s), "the oracle needs a regular matrix"
        expected.append(((f.mean(1) - g.mean(1)) ** 2).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real))
    np.testing.assert_allclose(metrics.sifid(a, b, weights).numpy(), expected, rtol=1e-4)


def test_frechet_of_known_gaussians():
    """Along one axis: (μ₁ - μ₂)² + (σ₁ - σ₂)²; and zero for the same samples, singular covariance or not."""
    x = torch.randn(1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std()
    assert metrics.frechet(2 * x + 1, 5 * x - 3).item() == pytest.approx(16 + 9)
    samples = torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet(samples, samples).abs() < 1e-10


# ---- CLIP, weights -----------------------------------------------------------------------------------------------

def test_clip_similarity_and_score():
    a, b = torch.tensor([[3.0, 0, 0], [1, 1, 0]]), torch.tensor([[-2.0, 0, 0], [5, 0, 0]])
    torch.testing.assert_close(metrics.clip_similarity(a, b), torch.tensor([-1, 0.5**0.5]))
    torch.testing.assert_close(metrics.clip_score(a, b), torch.tensor([0, 2.5 * 0.5**0.5]))


@pytest.mark.parametrize("kind", ["alex", "vgg", "inception", "alex heads", "vgg heads"])
def test_weights_load_from_a_file_that_holds_more(kind, tmp_path):
    """A published trunk has a classifier that no metric reads; half precision is widened."""
    tensors = {key: torch.randn(2, 3) for key in metrics.trunk_keys(kind)}
    save_file({key: x.half() for key, x in tensors.items()} | {"classifier.6.weight": torch.zeros(9)},
              tmp_path / "file.safetensors")
    loaded = metrics.load_metric(tmp_path / "file.safetensors", kind)
    assert loaded.keys() == tensors.keys()
    for key, x in loaded.items():
        assert x.dtype == torch.float32 and torch.equal(x, tensors[key].half().float())


def test_wrong_weights_are_one_line(tmp_path):
    _, trunk, _ = lpips_parts("alex")
    save_file(trunk, tmp_path / "alex.safetensors")
    with pytest.raises(Problem, match=r"alex.safetensors: is not vgg weights for a metric, it has no features.12.bias; "
                                      "see weights/README.md"):
        metrics.load_metric(tmp_path / "alex.safetensors", "vgg")
    with pytest.raises(Problem, match="no such file"):
        metrics.load_metric(tmp_path / "none.safetensors", "alex")
