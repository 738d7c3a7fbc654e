"""Files: written whole or not at all, pictures with their recipe; and sha256."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .problem import Problem

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # the endings of images.FORMATS


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_text(text: str, path: str | Path) -> None:
    """Write a text whole or not at all, in UTF-8."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def save_png(image, path: str | Path, recipe: dict | None = None) -> None:
    """Write a PIL image as PNG, with the recipe as a text chunk; a picture of `vary` has its own."""
    from PIL.PngImagePlugin import PngInfo

    from .images import RECIPE_KEY
    info, recipe = PngInfo(), image.info.get(RECIPE_KEY) if recipe is None else recipe
    if isinstance(recipe, dict):  # a text is the recipe of a file that was read: not this picture's
        info.add_itxt(RECIPE_KEY, json.dumps(recipe))  # ASCII: a path may hold bytes that are not UTF-8
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def try_write(path: str | Path) -> None:
    """Raises the Problem that atomic_write would, before the work."""
    with _problems_of(path):
        os.unlink(_temporary(Path(path)))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[str]:
    """`with atomic_write(path) as temporary:` - `path` appears, complete, only if the block succeeds."""
    with _problems_of(path):
        temporary = _temporary(Path(path))
        try:
            yield temporary
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp's and safetensors' 0600 is not what users expect
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    if path.exists() and not path.is_file():  # the rename would replace a device by a file
        raise OSError(0, "is not a regular file")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    return temporary


@contextmanager
def _problems_of(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Problem(f"{path}: cannot write there ({error.strerror or error}); choose another -o") from None
