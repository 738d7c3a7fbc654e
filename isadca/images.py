"""Pictures in and out: PIL <-> tensors, the two resize rules, contact sheets, PNG metadata.

Pixels are RGB. Tensors are (B,3,H,W): in [-1,1] for the VAE, normalised by CLIP's mean and std for the encoder.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from .config import Problem

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
RECIPE_KEY = "isadca"  # the PNG text chunk that holds the recipe


def load_image(path: str | Path, tell: Callable[[str], None] = lambda text: None) -> Image.Image:
    """A picture file as RGB, turned upright by its EXIF tag, transparency composited on white.

    `tell` is told what of it is not seen. Raises Problem for what is not a readable picture.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old cameras' EXIF and the like
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                if getattr(file, "is_animated", False):
                    tell(f"{path} holds {file.n_frames} pictures; the first is used")
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
        raise Problem(f"{path}: cannot be read ({reason})" if reason else
                      f"{path}: the picture is damaged ({error}); save it anew") from None
    if max(image.size) > 50 * min(image.size):
        raise Problem(f"{path}: is {image.width}×{image.height}, more than 50 times as long as wide; crop it first")
    return image


def _rgb(image: Image.Image, tell: Callable[[str], None] = lambda text: None) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, PIL would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            tell("what is transparent becomes white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: int, how: str = "crop") -> Image.Image:
    """To size × size (bicubic; untouched where it already is). What is not square is cut to its centre ("crop"),
    distorted ("squash") or given white borders ("pad"). Gives RGB."""
    image = _rgb(image)
    short, long = sorted(image.size)
    if how == "crop":
        left, top = (image.width - short) // 2, (image.height - short) // 2
        image = image.crop((left, top, left + short, top + short))
    elif how == "pad":
        image = ImageOps.pad(image, (long, long), color="white")
    elif how != "squash":
        raise Problem(f"fit is {how!r}, expected crop, squash or pad")
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


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


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, in dB; inf for equal ones."""
    mse = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


def contact_sheet(rows: list[list[Image.Image]], columns: list[str], labels: list[str]) -> Image.Image:
    """Pictures in a grid with a heading over each column and a label over each row. All of one size."""
    tile = max(rows[0][0].width, 128)  # tiny pictures are enlarged so that they, and the labels, can be read
    line, gap = max(18, tile // 12), max(2, tile // 64)
    font = ImageFont.load_default(size=line * 0.7)
    width, height = len(columns) * (tile + gap) + gap, line + len(rows) * (line + tile + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, colour: str, room: int) -> None:
        text = " ".join(text.split())[:room]  # one line, no wider than its column
        while font.getlength(text) > room:
            text = text[:-1]
        draw.text((x, y), text, colour, font)

    for i, heading in enumerate(columns):
        write(gap + i * (tile + gap), 1, heading, "black", tile)
    for j, (row, label) in enumerate(zip(rows, labels)):
        top = line + j * (line + tile + gap)
        write(gap, top, label, "dimgray", width - 2 * gap)
        for i, image in enumerate(row):
            big = image.resize((tile, tile), Image.Resampling.NEAREST if tile > image.width else None)
            sheet.paste(big, (gap + i * (tile + gap), top + line))
    return sheet


def save_png(image: Image.Image, path: str | Path, recipe: dict | None = None) -> None:
    """Write a PNG whole or not at all (temporary file, then rename), with the recipe as a text chunk."""
    info = PngImagePlugin.PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, json.dumps(recipe))  # ASCII: a path may hold bytes that are not UTF-8
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_text(text: str, path: str | Path) -> None:
    """Write a text whole or not at all, in UTF-8."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


class atomic_write:
    """`with atomic_write(path) as temporary:` - `path` appears, complete, only if the block succeeds."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> str:
        try:
            if self.path.exists() and not self.path.is_file():  # the rename would replace a device by a file
                raise OSError(0, "is not a regular file")
            handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise self._problem(error) from None
        os.close(handle)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                os.chmod(self.temporary, 0o666 & ~_umask())  # mkstemp's and safetensors' 0600 is not what users expect
                os.replace(self.temporary, self.path)
        except OSError as failed:
            raise self._problem(failed) from None
        finally:
            Path(self.temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise self._problem(error) from None

    def _problem(self, error: OSError) -> Problem:
        return Problem(f"{self.path}: cannot write there ({error.strerror or error}); choose another -o")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_recipe(path: str | Path) -> dict:
    """The recipe of a PNG that isadca wrote. Raises Problem where there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            file.load()
            recipe = json.loads(file.text[RECIPE_KEY])
        if not isinstance(recipe, dict):
            raise ValueError
        return recipe
    except FileNotFoundError:
        raise Problem(f"{path}: no such picture; check the path") from None
    except Exception:
        raise Problem(f"{path}: holds no isadca recipe; only PNGs written by isadca do") from None
