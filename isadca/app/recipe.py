"""The recipe that every picture carries: the arguments, the versions, the sha256 of all inputs. Here it is made, read,
turned back into a command, and compared."""

import json
import platform
import re
import shlex
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from .. import __version__
from ..common.files import sha256
from ..common.images import RECIPE_KEY
from ..common.problem import Problem

# arguments that do not change the pixels (`compile` does, by rounding only)
NOT_KEPT = {"command", "refs", "out", "grid", "log", "preview", "overwrite", "recipe", "recipe_source", "quiet",
            "own_code", "prompts_file", "compile"}


def inputs_of(files: dict[str, Path], weights: Path, vocabulary: Path) -> dict[str, Path]:
    """All files that a model was made of, by what they are: the weights in `files`, the configs beside them, the
    scheduler's config in the weights folder, the tokenizer's folder `vocabulary`."""
    found = files | {f"{part} config": path.parent / "config.json" for part, path in files.items()}
    folder = weights if weights.is_dir() else weights.parent
    found["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    found |= {f"tokenizer/{path.name}": path for path in sorted(vocabulary.iterdir())
              if path.suffix in (".json", ".txt")}
    return {part: path for part, path in found.items() if path.is_file()}


def hash_files(files: dict[str, Path]) -> Future:
    """sha256 of the files by what they are, computed while the sampling runs: 4 GB take seconds."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(lambda: {part: sha256(path) for part, path in files.items()})
    pool.shutdown(wait=False)
    return future


def make_recipe(args: dict, reference_sha256: str, hashes: dict[str, str], device: str, dtype: str) -> dict:
    """`args` are the command line's, by name. Everything in it is JSON."""
    import torch
    kept = {key: value for key, value in sorted(args.items()) if key not in NOT_KEPT}
    return {"command": args["command"], "args": json.loads(json.dumps(kept)),  # as it will be read again
            "reference_sha256": reference_sha256, "weights_sha256": hashes, "device": device, "dtype": dtype,
            "compiled": bool(args.get("compile")),
            "versions": {"isadca": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "threads": torch.get_num_threads()}


def read_recipe(path: str | Path) -> dict:
    """The recipe of a PNG that isadca wrote. Raises Problem where there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            file.load()
            recipe = json.loads(file.info[RECIPE_KEY])
        if not isinstance(recipe, dict):
            raise ValueError
        return recipe
    except FileNotFoundError:
        raise Problem(f"{path}: no such picture; check the path") from None
    except PermissionError:
        raise Problem(f"{path}: may not be read; look at its permissions") from None
    except Exception:
        raise Problem(f"{path}: holds no isadca recipe; only PNGs written by isadca do") from None


def recipe_flags(recipe: dict, command: str, source: Path) -> tuple[list[str], list[str]]:
    """A recipe's REF and PROMPT, and its flags as one would type them, so that they pass the same checks.

    A reference that is not where it was is looked for beside the picture.
    """
    if recipe.get("command") != command:
        made = str(recipe.get("command"))
        by = "from Python" if made.startswith("isadca.") else f"by isadca {made}"
        raise Problem(f"{source}: was made {by}, expected isadca {command}; isadca inspect shows how")
    args = recipe.get("args") if isinstance(recipe.get("args"), dict) else {}
    ref, prompt = args.get("ref"), args.get("prompt")
    if (not isinstance(ref, str) or not isinstance(prompt, str) or "\0" in ref
            or not isinstance(recipe.get("weights_sha256"), dict)
            or not all(re.fullmatch("[a-z_]+", key) for key in args)):  # "grid=x" would be another flag
        raise Problem(f"{source}: its recipe is damaged; give REF, PROMPT and the flags yourself")
    beside = source.parent / Path(ref).name
    if not Path(ref).exists() and beside.exists() and not beside.samefile(source):
        ref = str(beside)
    flags = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in args.items()}
    return [ref, prompt], [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()
                           if value is not None and key not in NOT_KEPT | {"ref", "prompt"}]


def typed_again(recipe: dict, source: Path) -> str:
    """The command that makes the picture, as one would type it."""
    from .flags import parser
    words, flags = recipe_flags(recipe, "vary", source)
    usual = {f"{flag}={action.default}" for flag, action in parser()[1]["vary"]._option_string_actions.items()}
    return shlex.join(["isadca", "vary", *words, *(flag for flag in flags if flag not in usual), "-o", "OUT.png"])


def differing(before: dict, hashes: dict[str, str]) -> str | None:
    """The first part that differs from `before`."""
    return next((part for part in before | hashes if before.get(part) != hashes.get(part)), None)


def made_elsewhere(recipe: dict, now: dict) -> str:
    """What is not as it was and can move a pixel by a grey level, since the order of additions depends on it."""
    was = {name: recipe.get(name) for name in ("device", "dtype", "threads", "batch", "compiled")}
    if isinstance(recipe.get("versions"), dict):
        was["torch"] = recipe["versions"].get("torch")
    here = now | {"torch": now["versions"]["torch"]}
    return ", ".join(f"{name} {value}, here {here.get(name)}" for name, value in was.items()
                     if value not in (None, here.get(name)))


def check_same(recipe: dict, source: Path, reference: Path, reference_sha256: str, hashes: dict[str, str]) -> None:
    """Raise Problem where the reference or anything else is not what made the picture."""
    if recipe.get("reference_sha256") != reference_sha256:
        raise Problem(f"{reference}: is not the reference that {source} was made from; give the right one as REF")
    if part := differing(recipe["weights_sha256"], hashes):
        was, now = (str(has.get(part))[:12] for has in (recipe["weights_sha256"], hashes))
        raise Problem(f"{source}: was made with another {part} (sha256 {was}, this one has {now}); give the right "
                      "--weights, or the prompt and flags yourself")
