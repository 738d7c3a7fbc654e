"""The recipe that every picture carries: the arguments, the versions, the sha256 of all that went in."""

import hashlib
import json
import platform
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..common.files import sha256
from ..common.images import RECIPE_KEY
from ..common.problem import Problem

NOT_KEPT = {"command", "out", "grid", "recipe", "recipe_source", "quiet", "own_code"}  # these do not change the pixels


def hash_files(files: dict[str, Path]) -> Future:
    """sha256 of the model's files by part, computed beside the sampling: 4 GB take seconds."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: {part: sha256(path) for part, path in files.items()})
    pool.shutdown(wait=False)
    return future


def fingerprint(hashes: dict[str, str]) -> str:
    """One sha256 for what an inversion depends on: UNet, VAE and text encoder."""
    return hashlib.sha256("".join(hashes[part] for part in ("unet", "vae", "text")).encode()).hexdigest()


def make_recipe(args: dict, reference: Path, hashes: dict[str, str], device: str, dtype: str) -> dict:
    """`args` are the command line's, by name. Everything in it is JSON."""
    import torch

    from .. import __version__
    return {"command": args["command"],
            "args": {key: value for key, value in sorted(args.items()) if key not in NOT_KEPT},
            "reference_sha256": sha256(reference), "weights_sha256": hashes, "device": device, "dtype": dtype,
            "versions": {"isadca": __version__, "torch": torch.__version__, "python": platform.python_version()}}


def recipe_flags(recipe: dict, command: str, source: Path) -> tuple[dict[str, str], list[str]]:
    """What a recipe says of REF and PROMPT, and its flags as one types them, so that they are checked as those are.

    A reference that is not where it was is looked for beside the picture.
    """
    if recipe.get("command") != command:
        raise Problem(f"{source}: was made by isadca {recipe.get('command')}, expected isadca {command}")
    args = recipe.get("args")
    words = {key: args.get(key) for key in ("ref", "prompt")} if isinstance(args, dict) else {"args": None}
    if not all(isinstance(word, str) for word in words.values()) or not isinstance(recipe.get("weights_sha256"), dict):
        raise Problem(f"{source}: its recipe is damaged; give REF, PROMPT and the flags yourself")
    beside = source.parent / Path(words["ref"]).name
    if not Path(words["ref"]).exists() and beside.exists():
        words["ref"] = str(beside)
    flags = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in args.items()}
    return words, [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()
                   if value is not None and key not in NOT_KEPT | words.keys()]


def check_same(recipe: dict, source: Path, reference: Path, hashes: dict[str, str]) -> None:
    """Raise Problem where the reference or the weights are not those that made the picture."""
    if recipe.get("reference_sha256") != sha256(reference):
        raise Problem(f"{reference}: is not the reference that {source} was made from; give the right one as REF")
    for part, digest in recipe["weights_sha256"].items():
        if hashes.get(part) != digest:
            raise Problem(f"{source}: was made with another {part} (sha256 {str(digest)[:12]}, this one has "
                          f"{str(hashes.get(part))[:12]}); give the right --weights, or the prompt and flags yourself")


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
