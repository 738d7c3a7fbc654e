"""Preprocessing, tokenizer and metrics in NumPy and the standard library, from sections 7 to 9 of README.md."""

import math
import unicodedata

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from numpy_networks import Weights

# ---- 7. Pictures -----------------------------------------------------------------------------------------------


def bicubic(x):
    x = np.abs(x)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x <= 2, outer, 0.0))


def resize_first_axis(x, new):
    if len(x) == new:
        return x
    r = len(x) / new
    s = max(r, 1.0)
    matrix = np.zeros((new, len(x)))
    for i, c in enumerate((np.arange(new) + 0.5) * r):
        j = np.arange(max(math.floor(c - 2 * s + 0.5), 0), min(math.floor(c + 2 * s + 0.5), len(x)))
        weights = bicubic((j + 0.5 - c) / s)
        matrix[i, j] = weights / weights.sum()
    return np.floor(np.tensordot(matrix, x, axes=1) + 0.5).clip(0, 255)


def resize(x, height, width):
    x = resize_first_axis(x.swapaxes(0, 1), width).swapaxes(0, 1)
    return resize_first_axis(x, height)


def rgb(image):
    x = image.astype(np.float64)
    if x.ndim == 2:
        return np.repeat(x[..., None], 3, axis=2)
    if x.shape[2] == 3:
        return x
    share = x[..., 3:] / 255
    return np.floor(x[..., :3] * share + 255 * (1 - share) + 0.5)


def batch(x):
    return x.transpose(2, 0, 1)[None]


def vae_pixels(image, size, how):
    x = rgb(image)
    h, w = x.shape[:2]
    if how == "crop":
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        x = x[top: top + side, left: left + side]
    elif how == "pad":
        side = max(h, w)
        top, left = round((side - h) / 2), round((side - w) / 2)
        x = np.pad(x, ((top, side - h - top), (left, side - w - left), (0, 0)), constant_values=255)
    return batch(resize(x, size, size) / 127.5 - 1)


def clip_pixels(image, size):
    x = rgb(image)
    h, w = x.shape[:2]
    x = resize(x, size * h // min(h, w), size * w // min(h, w))
    top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return batch((x[top: top + size, left: left + size] / 255 - mean) / deviation)


# ---- 8. Text ---------------------------------------------------------------------------------------------------

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def kind(c):
    if c.isspace() and not "\x1c" <= c <= "\x1f":
        return "space"
    return unicodedata.category(c)[0] if unicodedata.category(c)[0] in "LN" else "other"


def words(text):
    while text:
        contraction = next((c for c in CONTRACTIONS if text.startswith(c)), None)
        n = len(contraction) if contraction else 1
        if contraction is None and kind(text[0]) in ("L", "other"):
            while n < len(text) and kind(text[n]) == kind(text[0]):
                n += 1
        if kind(text[0]) != "space":
            yield text[:n]
        text = text[n:]


def byte_letters():
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {**{b: chr(b) for b in own}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}


LETTERS = byte_letters()


def pieces(word, rank):
    parts = [LETTERS[b] for b in word.encode("utf-8")]
    parts[-1] += "</w>"
    while pairs := [p for p in zip(parts, parts[1:]) if p in rank]:
        best, i = min(pairs, key=rank.get), 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == best:
                parts[i: i + 2] = ["".join(best)]
            i += 1
    return parts


def ids_of(text, vocab, rank):
    at = min((text.find(s), s) for s in SPECIAL if s in text) if any(s in text for s in SPECIAL) else None
    if at:
        before, after = text[: at[0]], text[at[0] + len(at[1]):]
        return ids_of(before, vocab, rank) + [vocab[at[1]]] + ids_of(after, vocab, rank)
    text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
    return [vocab[piece] for word in words(text) for piece in pieces(word, rank)]


def tokenize(texts, vocab, merges):
    rank = {tuple(line.split(" ")): i for i, line in enumerate(merges[1:])}
    start, end = (vocab[s] for s in SPECIAL)
    rows = [[start, *ids_of(text, vocab, rank)[:75], end] for text in texts]
    return np.array([row + [end] * (77 - len(row)) for row in rows])


# ---- 9. Metrics ------------------------------------------------------------------------------------------------

def ssim(a, b):
    a, b = (a + 1) * 127.5, (b + 1) * 127.5
    line = np.exp(-np.arange(-5.0, 6.0) ** 2 / 4.5)
    line /= line.sum()

    def mean(x):
        for axis in (2, 3):
            x = sliding_window_view(x, 11, axis=axis) @ line
        return x
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    places = (2 * ma * mb + 2.55**2) * (2 * cov + 7.65**2) / ((ma**2 + mb**2 + 2.55**2) * (va + vb + 7.65**2))
    return places.mean((1, 2, 3))


def pool(x, size):
    return sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::2, ::2].max((4, 5))


ALEX = [0, "tap", "pool", 3, "tap", "pool", 6, "tap", 8, "tap", 10, "tap"]
VGG = [0, 2, "tap", "pool", 5, 7, "tap", "pool", 10, 12, 14, "tap", "pool", 17, 19, 21, "tap", "pool",
       24, 26, 28, "tap"]


def lpips(a, b, kind, trunk, heads):
    w, distance, level = Weights(trunk)("features"), 0.0, 0
    shift, scale = np.array([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, :, None, None]
    x = (np.concatenate([a, b]) - shift) / scale
    moves = {0: dict(padding=2, stride=4), 3: dict(padding=2)} if kind == "alex" else {}
    for layer in ALEX if kind == "alex" else VGG:
        if layer == "pool":
            x = pool(x, 3 if kind == "alex" else 2)
        elif layer == "tap":
            f = x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-10)
            head, level = heads[f"lin{level}.model.1.weight"], level + 1
            distance = distance + (head * (f[:1] - f[1:]) ** 2).sum(1).mean((1, 2))
        else:
            x = np.maximum(w(str(layer)).conv(x, **moves.get(layer, dict(padding=1))), 0)
    return distance


def inception_features(x, w):
    for name, how in (("Conv2d_1a_3x3", dict(stride=2)), ("Conv2d_2a_3x3", {}), ("Conv2d_2b_3x3", dict(padding=1)),
                      ("pool", {}), ("Conv2d_3b_1x1", {}), ("Conv2d_4a_3x3", {})):
        if name == "pool":
            x = pool(x, 3)
            continue
        bn = w(name)("bn")
        mean, var, gain, bias = (bn[part][:, None, None] for part in ("running_mean", "running_var", "weight", "bias"))
        x = np.maximum((w(name)("conv").conv(x, **how) - mean) / np.sqrt(var + 0.001) * gain + bias, 0)
    return x[0].reshape(x.shape[1], -1)


def sifid(a, b, inception):
    f, g = (inception_features(x, Weights(inception)) for x in (a, b))
    cov_f, cov_g = np.cov(f), np.cov(g)
    values, vectors = np.linalg.eigh(cov_f)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # Tr (AB)^½ = Tr (A^½ B A^½)^½, whose matrix is symmetric
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_g @ root).clip(0)).sum()
    return np.array([((f.mean(1) - g.mean(1)) ** 2).sum() + np.trace(cov_f) + np.trace(cov_g) - 2 * trace])
