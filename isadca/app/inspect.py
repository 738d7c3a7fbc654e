"""isadca inspect: what a file is, for every kind that isadca reads or writes. isadca methods: the presets.

Each kind is described by a dict, which --json prints as it is; the text is made from the dict.
"""

import json
from argparse import Namespace
from dataclasses import fields
from math import prod
from pathlib import Path
from textwrap import fill

from ..common.files import PICTURES
from ..common.problem import Problem
from ..loading.known_encoders import guess
from ..loading.layouts import PREFIXES, Part
from ..methods import PRESETS
from .console import note
from .saved_reference import is_reference, load_reference

# files that evaluation and examples read beyond a model, each told by a key that no other file has
OTHERS = [("ControlNet", "diffusers", "controlnet_cond_embedding.conv_in.weight"),
          ("ControlNet", "LDM", "input_hint_block.0.weight"),
          ("ControlNet", "LDM", "control_model.input_hint_block.0.weight"),
          ("Kandinsky's prior", "diffusers", "prd_embedding"),
          ("AlexNet, for LPIPS", "torchvision", "features.6.weight"),
          ("VGG16, for LPIPS", "torchvision", "features.17.weight"),
          ("Inception-v3, for SIFID", "torchvision", "Conv2d_1a_3x3.conv.weight"),
          ("the heads of LPIPS", "lpips", "lin0.model.1.weight")]
CHECKED = ("unet", "vae", "text", "vision", "ip_adapter")
WEIGHTS = (".safetensors", ".json", ".ckpt", ".pt", ".pth", ".bin")
RECIPE = ("reference_sha256", "device", "dtype", "threads", "versions", "weights_sha256")


def inspect(args: Namespace) -> None:
    """What each path is; the first Problem is raised after the paths before it are printed."""
    for path in [each for path in args.paths for each in _pictures_in(path) or [path]]:
        if path.suffix.lower() in PICTURES:
            told = _picture(path)
        elif (path / "settings.json").is_file():
            told = _results(path)
        elif path.suffix == ".safetensors" and is_reference(path):
            told = _reference(path)
        elif path.is_file() and path.suffix.lower() not in WEIGHTS:
            raise Problem(f"{path}: is nothing that isadca writes or reads; expected a picture, weights, a saved "
                          "reference or a folder")
        else:
            told = _weights(path)
        print(json.dumps({"path": str(path)} | told) if args.json else "\n".join(_lines(path, told)))


def _pictures_in(folder: Path) -> list[Path]:
    """The PNGs of a folder that holds no weights and no results: what vary wrote."""
    other = (folder / "settings.json").exists() or (folder / "unet").exists() or any(folder.glob("*.safetensors"))
    return [] if other else sorted(folder.glob("*.png"))


def _lines(path: Path, told: dict) -> list[str]:
    """The same for people."""
    if told["what"] == "a picture":
        return [f"{path}: {told['command']}"] + [f"    {key}: {json.dumps(told[key])}" for key in RECIPE if told[key]]
    if told["what"] == "results":
        return [f"{path}: results of isadca evaluate, {told['variations']} variations",
                *(f"    {name}: {json.dumps(value)}" for name, value in told["settings"].items())]
    if told["what"] == "a saved reference":
        return [f"{path}: a saved reference, {told['size'][0]}×{told['size'][1]}, {told['steps']} steps, "
                f"prompt {told['prompt']!r}"]
    return [f"{part['path']}: {part['kind']}, layout {part['layout']}, {part['tensors']} tensors, "
            f"{part['parameters'] / 1e6:.1f} M parameters, {'/'.join(part['dtypes'])}, {part['bytes'] / 1e6:.1f} MB; "
            + ("loads" if part["loads"] else "recognised, not checked") for part in told["parts"]]


def _picture(path: Path) -> dict:
    from .recipe import read_recipe, typed_again
    recipe = read_recipe(path)
    command = typed_again(recipe, path) if recipe.get("command") == "vary" else recipe.get("run", recipe.get("command"))
    return {"what": "a picture", "command": command} | {name: recipe.get(name) for name in RECIPE}


def _results(path: Path) -> dict:
    from ..evaluation.results_folder import read_object
    settings = read_object(path / "settings.json")
    if not settings:
        raise Problem(f"{path}/settings.json: is damaged; a new run with another -o makes one")
    return {"what": "results", "variations": len(list(path.glob("pictures/*/*-*.png"))), "settings": settings}


def _reference(path: Path) -> dict:
    ref = load_reference(path, None)
    return {"what": "a saved reference", "size": ref.image.size, "steps": ref.steps, "prompt": ref.prompt}


# ---- weights -----------------------------------------------------------------------------------------------------

def _weights(path: Path) -> dict:
    parts = []
    for part in parts_of(path):
        parts.append({"path": str(part.path), "kind": part.kind, "layout": part.layout, "tensors": len(part.tensors),
                      "parameters": sum(map(prod, part.shapes.values())),
                      "dtypes": sorted({tensor.dtype for tensor in part.tensors.values()}),
                      "bytes": sum(file.stat().st_size for file in part.files),
                      "loads": part.kind in CHECKED or None})  # None: not checked
        if part.kind == "vision" and (told := guess(part.path, *part.shapes["vision_model.pre_layrnorm.weight"])):
            note(told)
    return {"what": "weights", "parts": parts}


def parts_of(path: Path) -> list[Part]:
    """The parts that a file, a model's folder, or a folder of safetensors files holds. Raises Problem for the first
    that would not load; a model's folder includes its scheduler and vocabulary."""
    import torch

    from ..loading.checkpoints import check_names, shapes_of
    from ..loading.config_json import read_schedule
    from ..loading.load import FOLDERS, build, load_tokenizer, locate, read_parts
    folders = {kind: path / name for kind, name in FOLDERS.items() if (path / name).is_dir()}
    is_model = "unet" in folders and ("text" in folders or "vision" not in folders)
    if is_model:
        encoder = {"vision": folders["vision"]} if "vision" in folders else {}
        parts = list(read_parts(locate(path) | encoder, torch.float32).values())
    elif folders:  # SD image-variations, whose UNet reads no text, or Kandinsky's prior
        parts = list(read_parts(folders, torch.float32).values())
    elif path.is_dir():
        parts = [part for file in sorted(path.glob("*.safetensors")) for part in _of_file(file)]
        if not parts:
            raise Problem(f"{path}: no unet folder and no .safetensors files in it")
    else:
        parts = _of_file(path)
    for part in parts:
        if part.kind in CHECKED:
            network = build(part)
            check_names(shapes_of(network), part)
            if part.kind == "text" and (is_model or (path / "tokenizer").is_dir()):
                load_tokenizer(path, network.config)
    if is_model:
        read_schedule(path / "scheduler" / "scheduler_config.json")
    return parts


def _of_file(path: Path) -> list[Part]:
    from ..loading.checkpoints import read_header, recognise
    header = read_header(path)
    if not any(key.startswith(PREFIXES) for key in header.tensors):  # a whole model may hold a ControlNet, too
        for kind, layout, mark in OTHERS:
            if mark in header.tensors:
                return [Part(kind, layout, header, header.tensors)]
    return list(recognise(path).values())


def methods(args: Namespace) -> None:
    for method in PRESETS.values():
        print(f"{method.name}: {method.source}")
        values = [f"{f.name}={getattr(method, f.name)}" for f in fields(method) if f.name not in ("name", "source")]
        print(fill(", ".join(values), 100, initial_indent="    ", subsequent_indent="    "))
