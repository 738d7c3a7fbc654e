"""A folder of results: where each variation and its numbers lie, and what a folder was begun with.

RESULTS/pictures/PAIR/SYSTEM-SEED.png has its numbers beside it as JSON, RESULTS/settings.json the experiment's inputs.
"""

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..common.files import save_text
from ..common.images import load_image
from ..common.problem import Problem
from .pairs import Pair
from .systems import System

PACKAGE = Path(__file__).parent.parent


class Item(NamedTuple):
    """One variation to make and measure."""

    index: int  # type: ignore[assignment]  # of the pair; a tuple has a method of this name
    pair: Pair
    system: System
    seed: int

    def picture(self, results: Path) -> Path:
        return results / "pictures" / f"{self.index:04d}" / f"{file_name(self.system.name)}-{self.seed}.png"

    def load(self, results: Path, size: int, made_by: str) -> Image.Image | None:
        """The variation, if it is there, whole, of the right size, and made by the code that `made_by` stands for."""
        try:
            image = load_image(self.picture(results))
        except Problem:
            return None
        found = read_object(self.picture(results).with_suffix(".json"))
        return image if image.size == (size, size) and found.get("made_by") == made_by else None

    def numbers(self, results: Path) -> dict[str, float]:
        """Its seconds and its scores, as far as they are known."""
        found = read_object(self.picture(results).with_suffix(".json"))
        return {key: value for key, value in found.items() if type(value) is float and math.isfinite(value)}


Numbers = dict[Item, dict[str, float]]


def file_name(system: str) -> str:
    plain = re.sub(r"[^\w.=+-]", "_", system, flags=re.ASCII)
    return plain if len(plain) <= 100 else f"{plain[:80]}-{text_sha256(system)[:12]}"  # 255 is the file system's most


def read_object(path: Path) -> dict:
    """A JSON object; empty where there is no file, or it holds something else, or is longer than isadca's are."""
    try:
        short = path.is_file() and path.stat().st_size < 1 << 20
        found = json.loads(path.read_text(encoding="utf-8")) if short else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_apart(results: Path, inputs: Iterable[Path]) -> None:
    """Raises Problem where the folder's files would replace what is read, or would lie elsewhere, behind a link."""
    top, pictures = results.resolve(), results / "pictures"
    for path in map(Path.resolve, inputs):
        if path.parent == top or path.is_relative_to(top / "pictures"):
            raise Problem(f"{path}: is inside {results} and could be replaced; choose another -o")
    for folder in (pictures, *(pictures.iterdir() if pictures.is_dir() else ())):
        if not folder.resolve().is_relative_to(top):
            raise Problem(f"{folder}: is a link that leads out of {results}; choose another -o")


def check_settings(results: Path, settings: dict[str, str | int], extras: dict[str, str]) -> None:
    """Make the folder, which holds one experiment. Raises Problem, naming what changed, where it was begun with other
    `settings`. The files of `extras`, the other systems' and the metrics', may come later; none may change."""
    path = results / "settings.json"
    try:
        results.mkdir(exist_ok=True)
    except OSError as error:
        raise Problem(f"{results}: cannot be made or written ({error.strerror}); choose another -o") from None
    if path.exists():
        had, had_extras = (read_object(path).get(key) for key in ("settings", "extras"))
        if not (isinstance(had, dict) and isinstance(had_extras, dict)):
            raise Problem(f"{path}: is damaged, or of another version of isadca; choose another -o")
        changed = [key for key in had | settings if had.get(key) != settings.get(key)]
        changed += [key for key in extras.keys() & had_extras if had_extras[key] != extras[key]]
        if changed:
            raise Problem(f"{results}: was begun with other {', '.join(changed)[:150]}; choose another -o for a new "
                          "experiment")
        extras = had_extras | extras
    save_text(json.dumps({"settings": settings, "extras": extras}, indent=1) + "\n", path)


def code_sha256(patterns: Iterable[str]) -> str:
    """sha256 of the package's source, without comments and layout: who edits it gets new pictures and numbers."""
    paths = sorted(path for pattern in patterns for path in PACKAGE.glob(pattern))
    return text_sha256("\n".join(ast.dump(ast.parse(path.read_bytes())) for path in paths))


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
