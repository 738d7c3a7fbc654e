"""Pictures: read, PIL <-> tensors, the two resize rules.

Pixels are RGB. Tensors are (B,3,H,W): in [-1,1] for the VAE, normalised by CLIP's mean and std for the encoder.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .problem import Problem

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
RECIPE_KEY = "isadca"  # the PNG text chunk that holds the recipe


def load_image(path: str | Path, tell: Callable[[str], None] = lambda text: None) -> Image.Image:
    """A picture file as RGB, turned upright by its EXIF tag, transparency composited on white.

    `tell` receives a note on whatever is left out or guessed. Raises Problem for what is not a readable picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old cameras' EXIF and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():  # opening it would wait
                raise OSError(0, "is a pipe or a device")
            with Image.open(path, formats=FORMATS) as file:
                if (frames := getattr(file, "n_frames", 1)) > 1:
                    tell(f"{path} holds {frames} pictures; the first is used")
                image = _rgb(ImageOps.exif_transpose(file), lambda text: tell(f"{path}: {text}"))
    except FileNotFoundError:
        raise Problem(f"{path}: no such picture; check the path") from None
    except IsADirectoryError:
        raise Problem(f"{path}: is a folder, expected a picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Problem(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down first") from None
    except Image.UnidentifiedImageError:
        raise Problem(f"{path}: not a picture that can be read; convert it to one of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = getattr(error, "strerror", None)  # only the file system's errors have one
        raise Problem(f"{path}: cannot be read ({reason}); check the file" if reason else
                      f"{path}: the picture is damaged ({error}); save it anew") from None
    if max(image.size) > 50 * min(image.size):
        raise Problem(f"{path}: is {image.width}×{image.height}, more than 50 times as long as wide; crop it first")
    return image


def _rgb(image: Image.Image, tell: Callable[[str], None] = lambda text: None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        from .deep_grey import eight_bits
        image = eight_bits(image, tell)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            tell("what is transparent becomes white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], how: str = "crop") -> Image.Image:
    """To `size`, (width, height), bicubic; unchanged if it has that size. A picture of another shape is cut to its
    centre ("crop"), distorted ("squash") or given white borders ("pad"). Gives RGB."""
    image = _rgb(image)
    scales = [has / wanted for has, wanted in zip(image.size, size)]
    scale = max(scales) if how == "pad" else min(scales)
    width, height = (max(1, round(scale * side)) for side in size)
    if how == "crop":
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    elif how == "pad":
        image = ImageOps.pad(image, (width, height), color="white")
    elif how != "squash":
        raise Problem(f"fit is {how!r}, expected crop, squash or pad")
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """PIL -> (1,3,H,W) in [-1,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_images(x: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1] -> PIL, clipped and rounded to 8 bits."""
    pixels = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels.permute(0, 2, 3, 1).cpu()]


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """PIL -> what CLIP's image encoder reads, (1,3,size,size): shortest side to `size` (bicubic, antialiased),
    centre crop, normalise. The same as transformers' CLIPImageProcessor on PIL."""
    image = _rgb(image)
    short = min(image.size)
    resized = image.resize((size * image.width // short, size * image.height // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    x = torch.from_numpy(np.array(resized.crop((left, top, left + size, top + size)))).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return (x.float() / 255 - mean) / std
