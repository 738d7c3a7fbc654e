"""Vectors of SSIM, LPIPS and SIFID on two pictures, in NumPy float64 from the definitions, with small trunks."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cases import Case, File
from make_networks import random_weights

ALEX = [(0, 11, 4, 2), "tap", "pool", (3, 5, 1, 2), "tap", "pool", (6, 3, 1, 1), "tap", (8, 3, 1, 1), "tap",
        (10, 3, 1, 1), "tap"]  # number in `features`, kernel, stride, padding
VGG = [n if isinstance(n, str) else (n, 3, 1, 1) for n in (
    0, 2, "tap", "pool", 5, 7, "tap", "pool", 10, 12, 14, "tap", "pool", 17, 19, 21, "tap", "pool", 24, 26, 28, "tap")]
TRUNKS = {"alex": (ALEX, 3), "vgg": (VGG, 2)}  # layers, and the pooling's window
INCEPTION = [("Conv2d_1a_3x3", 3, 2, 0), ("Conv2d_2a_3x3", 3, 1, 0), ("Conv2d_2b_3x3", 3, 1, 1), "pool",
             ("Conv2d_3b_1x1", 1, 1, 0), ("Conv2d_4a_3x3", 3, 1, 0)]


def conv(x, w, stride, padding):
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, w, optimize=True)


def pool(x, size):
    return sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::2, ::2].max((-2, -1))


# ---- weights ---------------------------------------------------------------------------------------------------

def trunk_shapes(kind):
    widths = iter((4, 6, 8, 6, 6) if kind == "alex" else (4, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7))
    shapes, heads, width = {}, {}, 3
    for layer in TRUNKS[kind][0]:
        if layer == "tap":
            heads[f"lin{len(heads)}.model.1.weight"] = (1, width, 1, 1)
        elif layer != "pool":
            number, size, _, _ = layer
            width, before = next(widths), width
            shapes |= {f"features.{number}.weight": (width, before, size, size), f"features.{number}.bias": (width,)}
    return shapes, heads


def weights():
    """Every file of model/metrics/: path -> arrays."""
    files = {}
    for seed, kind in enumerate(TRUNKS):
        shapes, heads = trunk_shapes(kind)
        files[f"model/metrics/{kind}.safetensors"] = random_weights(shapes, 30 + seed)
        files[f"model/metrics/lpips-{kind}.safetensors"] = {
            name: np.abs(x) for name, x in random_weights(heads, 40 + seed).items()}
    shapes, width = {}, 3
    for layer in INCEPTION:
        if layer != "pool":
            name, size, _, _ = layer
            width, before = {"Conv2d_4a_3x3": 8}.get(name, 6), width
            shapes |= {f"{name}.conv.weight": (width, before, size, size)}
            shapes |= {f"{name}.bn.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    inception = random_weights(shapes, 50)
    for name, x in inception.items():
        if name.endswith("running_var"):
            x += np.float16(1)
    files["model/metrics/inception.safetensors"] = inception
    return files


# ---- the metrics -----------------------------------------------------------------------------------------------

def ssim(a, b, window=None, correction=1.0, scale=127.5, top=255):
    a, b = ((x + 1) * scale for x in (a, b))
    if window is None:
        taps = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
        window = np.outer(taps, taps) / taps.sum() ** 2

    def mean(x):
        return np.einsum("bchwij,ij->bchw", sliding_window_view(x, (11, 11), axis=(2, 3)), window)
    ma, mb = mean(a), mean(b)
    va, vb, cov = ((mean(x * y) - m) * correction for x, y, m in ((a, a, ma**2), (b, b, mb**2), (a, b, ma * mb)))
    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean((1, 2, 3))


def lpips(a, b, kind, trunk, heads, scaled=True, unit=True):
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    layers, window = TRUNKS[kind]
    x = np.concatenate([a, b])
    x = (x - shift[:, None, None]) / scale[:, None, None] if scaled else x
    level, distance = 0, 0.0
    for layer in layers:
        if layer == "pool":
            x = pool(x, window)
        elif layer == "tap":
            f = x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-10) if unit else x
            difference = (f[: len(a)] - f[len(a):]) ** 2
            head = heads[f"lin{level}.model.1.weight"][0, :, 0, 0]
            distance, level = distance + np.einsum("bchw,c->bhw", difference, head).mean((1, 2)), level + 1
        else:
            number, _, stride, padding = layer
            bias = trunk[f"features.{number}.bias"][:, None, None]
            x = np.maximum(conv(x, trunk[f"features.{number}.weight"], stride, padding) + bias, 0)
    return distance


def inception_map(x, w):
    for layer in INCEPTION:
        if layer == "pool":
            x = pool(x, 3)
            continue
        name, _, stride, padding = layer
        mean, var, gain, bias = (w[f"{name}.bn.{part}"][:, None, None]
                                 for part in ("running_mean", "running_var", "weight", "bias"))
        x = conv(x, w[f"{name}.conv.weight"], stride, padding)
        x = np.maximum((x - mean) / np.sqrt(var + 0.001) * gain + bias, 0)
    return x


def sifid(a, b, inception, over=1):
    """The root's trace is the sum of the roots of the eigenvalues of the covariances' product."""
    f, g = (inception_map(x, inception)[0].reshape(8, -1) for x in (a, b))
    s, t = (np.cov(x, ddof=over) for x in (f, g))
    roots = np.sqrt(np.linalg.eigvals(s @ t).real.clip(0)).sum()
    return np.array([((f.mean(1) - g.mean(1)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * roots])


def cases():
    rng = np.random.default_rng(25)
    y, x, c = np.meshgrid(np.arange(36), np.arange(32), np.arange(3), indexing="ij")
    a = np.sin(0.2 * x + c) * np.cos(0.15 * y)
    b = (0.8 * np.sin(0.2 * x + c + 0.4) * np.cos(0.17 * y) + 0.15 * rng.standard_normal(a.shape)).clip(-1, 1)
    a, b = (np.round(p.transpose(2, 0, 1)[None] * 127.5) / 127.5 for p in (a, b))
    yield Case("ssim", "two pictures", dict(a=a, b=b), ssim(a, b), 1e-10, {
        "the window is flat, it is a Gaussian": ssim(a, b, window=np.full((11, 11), 1 / 121)),
        "the variances are divided by n - 1": ssim(a, b, correction=121 / 120),
        "the pictures are in 0 to 1, the constants in 0 to 255": ssim(a, b, scale=0.5)})
    yield Case("ssim", "the same picture twice", dict(a=a, b=a), np.ones(1), 1e-10)
    loaded = {path: {name: v.astype(np.float64) for name, v in content.items()} for path, content in weights().items()}
    for kind in TRUNKS:
        paths = [f"model/metrics/{kind}.safetensors", f"model/metrics/lpips-{kind}.safetensors"]
        trunk, heads = (loaded[path] for path in paths)
        yield Case("lpips", kind, dict(a=a, b=b, kind=kind, trunk=File(paths[0]), heads=File(paths[1])),
                   lpips(a, b, kind, trunk, heads), 1e-10, {
            "the input is not shifted and scaled: version 0.0": lpips(a, b, kind, trunk, heads, scaled=False),
            "the features are not of unit length": lpips(a, b, kind, trunk, heads, unit=False)})
    path = "model/metrics/inception.safetensors"
    yield Case("sifid", "two pictures", dict(a=a, b=b, inception=File(path)), sifid(a, b, loaded[path]), 1e-8, {
        "the covariances are divided by n, not by n - 1": sifid(a, b, loaded[path], over=0)})
