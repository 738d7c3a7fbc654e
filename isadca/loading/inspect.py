"""What a path holds, each part checked to load; nothing is read but headers and settings."""

from pathlib import Path

import torch

from ..common.problem import Problem
from .checkpoints import Part, check_names, recognise, shapes_of
from .config_json import read_schedule
from .load import FOLDERS, build, load_tokenizer, locate, read_parts


def parts_of(path: Path) -> list[Part]:
    """Every part that a file, a model folder, or a folder of safetensors files holds. Raises Problem for the first
    that would not load; a model folder's scheduler and vocabulary belong to it."""
    if not path.is_dir():
        parts = recognise(path)
    elif (path / "unet").is_dir():
        parts = list(read_parts(_whole(path), torch.float32).values())
    else:
        parts = [part for file in sorted(path.glob("*.safetensors")) for part in recognise(file)]
        if not parts:
            raise Problem(f"{path}: no unet folder and no .safetensors files in it")
    for part in parts:
        network = build(part)
        check_names(shapes_of(network), part)
        if part.kind == "text" and (path / "unet").is_dir():
            read_schedule(path / "scheduler" / "scheduler_config.json")
            load_tokenizer(path, network.config)
    return parts


def _whole(path: Path) -> dict[str, Path]:
    places = locate(path)
    encoder = path / FOLDERS["vision"]
    return places | ({"vision": encoder} if encoder.is_dir() else {})
