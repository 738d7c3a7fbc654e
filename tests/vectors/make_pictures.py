"""Vectors of the preprocessing: the two resize rules in NumPy, on three small pictures.

The resampling is Pillow's: bicubic with a = -1/2, widened when it shrinks, rounded to 8 bits after each direction.
"""

import numpy as np

from cases import Case

LEVEL = 1.01 / 255  # one grey level of 0..1, and a little for rounding
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def cubic(x, a=-0.5):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def triangle(x):
    return max(0.0, 1 - abs(x))


def resize_rows(x, n, kernel, antialias):
    """(h,w,c) uint8 -> (n,w,c): every new row is a weighted mean of old ones, rounded to 8 bits."""
    ratio, reach = len(x) / n, 1.0 if kernel is triangle else 2.0
    width = max(ratio, 1.0) if antialias else 1.0
    new = np.empty((n, *x.shape[1:]), np.uint8)
    for i in range(n):
        centre = (i + 0.5) * ratio
        first, last = max(int(centre - reach * width + 0.5), 0), min(int(centre + reach * width + 0.5), len(x))
        weights = np.array([kernel((j + 0.5 - centre) / width) for j in range(first, last)])
        mean = np.tensordot(weights / weights.sum(), x[first:last].astype(np.float64), axes=(0, 0))
        new[i] = np.floor(mean + 0.5).clip(0, 255)
    return new


def resize(x, h, w, kernel=cubic, antialias=True):
    """Columns first, then rows; a direction that keeps its length is left alone."""
    if w != x.shape[1]:
        x = resize_rows(x.swapaxes(0, 1), w, kernel, antialias).swapaxes(0, 1)
    return resize_rows(x, h, kernel, antialias) if h != x.shape[0] else x


def rgb(x, background=255.0):
    """Grey becomes three equal channels; what is transparent becomes white."""
    if x.ndim == 2:
        return np.stack([x] * 3, axis=-1)
    if x.shape[-1] == 4:
        alpha = x[..., 3:] / 255
        return np.floor(x[..., :3] * alpha + background * (1 - alpha) + 0.5).astype(np.uint8)
    return x


def square(x, how):
    h, w = x.shape[:2]
    short, long = min(h, w), max(h, w)
    if how == "crop":
        top, left = (h - short) // 2, (w - short) // 2
        return x[top: top + short, left: left + short]
    if how == "pad":
        canvas = np.full((long, long, 3), 255, np.uint8)
        top, left = round((long - h) / 2), round((long - w) / 2)  # halves go to the even number
        canvas[top: top + h, left: left + w] = x
        return canvas
    return x


def channels_first(x):
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


def vae_pixels(x, size, how, background=255.0, **options):
    return channels_first(resize(square(rgb(x, background), how), size, size, **options) / 127.5 - 1)


def clip_pixels(x, size, **options):
    x = rgb(x)
    h, w = x.shape[:2]
    x = resize(x, size * h // min(h, w), size * w // min(h, w), **options)
    top, left = (x.shape[0] - size) // 2, (x.shape[1] - size) // 2
    return channels_first((x[top: top + size, left: left + size] / 255 - MEAN) / STD)


def pictures():
    """A wide one in colour, a tall one with transparency, a small grey one."""
    rng = np.random.default_rng(24)

    def picture(h, w, channels):
        y, x, c = np.meshgrid(np.arange(h), np.arange(w), np.arange(channels), indexing="ij")
        waves = 128 + 70 * np.sin(0.5 * x + c) + 50 * np.cos(0.4 * y - 2 * c)
        return (waves + rng.normal(0, 25, waves.shape)).clip(0, 255).astype(np.uint8)
    return {"wide": picture(21, 34, 3), "tall, transparent": picture(45, 26, 4), "grey": picture(7, 7, 1)[..., 0]}


def cases():
    for name, x in pictures().items():
        for how in ("crop", "squash", "pad") if x.shape[0] != x.shape[1] else ("crop",):
            right = vae_pixels(x, 12, how)
            mistakes = {"the pixels are in 0 to 1, not in -1 to 1": (right + 1) / 2,
                        "the resampling is bilinear": vae_pixels(x, 12, how, kernel=triangle)}
            if x.shape[0] != 7:
                mistakes["the bicubic is not widened where it shrinks"] = vae_pixels(x, 12, how, antialias=False)
                other = "squash" if how == "crop" else "crop"
                mistakes["the picture is squashed, not cropped" if how == "crop" else
                         "the picture is cropped"] = vae_pixels(x, 12, other)
            if x.shape[-1] == 4:
                mistakes["what is transparent becomes black"] = vae_pixels(x, 12, how, background=0.0)
            yield Case("vae_pixels", f"{name}, {how}", dict(image=x, size=12, how=how), right, 2 * LEVEL, mistakes)
        right = clip_pixels(x, 12)
        raw = right * STD[:, None, None] + MEAN[:, None, None]
        mistakes = {"CLIP's mean and deviation are missing": raw,
                    "the pixels are in -1 to 1, as the VAE's": 2 * raw - 1,
                    "the resampling is bilinear": clip_pixels(x, 12, kernel=triangle),
                    "the channels are blue, green, red": right[:, ::-1].copy()}
        if x.shape[0] != 7:
            squashed = channels_first((resize(rgb(x), 12, 12) / 255 - MEAN) / STD)
            mistakes["the picture is squashed, not cropped"] = squashed
        if x.ndim == 2:
            del mistakes["the channels are blue, green, red"]
        yield Case("clip_pixels", name, dict(image=x, size=12), right, LEVEL / STD.min(), mistakes)
