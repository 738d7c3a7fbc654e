"""The line before the work: which model, where, how much; and the words of a prompt that the demo does not know."""

from pathlib import Path

from ..loading.load import default_weights
from ..methods import Method
from ..networks.model import Model

LARGE = 256  # pixels a side from which a CPU takes minutes a picture


def start_line(model: Model, weights: Path, size: tuple[int, int], steps: int, pictures: int, rows: int) -> str:
    """`rows` are those of the largest call of the UNet."""
    name = "the demo (64×64 emoji; for photos: isadca fetch)" if is_demo(weights) else str(weights)
    dtype = str(model.dtype).removeprefix("torch.")
    many = f", {pictures} picture{'s' * (pictures > 1)}" if pictures else ""
    line = (f"{name} on {model.device} in {dtype}: {size[0]}×{size[1]}, {steps} step{'s' * (steps > 1)}{many}, "
            f"about {memory(model, size, rows):.1f} GB")
    if model.device.type == "cpu" and max(size) >= LARGE:
        line += "; on a CPU this is for checking, a GPU (--device cuda) is far faster"
    return line


def is_demo(weights: Path) -> bool:
    return weights.resolve() == default_weights().resolve()


def strange_words(model: Model, prompt: str) -> list[str]:
    """The words that the demo's world lacks: its tokenizer has each of its own as one token."""
    return [word for word, rows in model.tokenizer.words(prompt) if len(rows) > 1]


def rows_a_step(method: Method) -> int:
    """Rows of the UNet that a step of one picture takes: one a guidance half and branch."""
    branches = 2 if method.mix == "noise" and method.lam not in (0, 1) else 1
    return branches * (1 if method.guidance == 1 else 2)


def memory(model: Model, size: tuple[int, int], rows: int) -> float:
    """GB, roughly: torch itself, the weights, and the UNet's rows or the VAE's picture, whichever is more.

    A row holds the skips of its way down, the widest feed-forward (12 times its channels) and the reference's keys and
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
