"""Image encoders that are published without their config.json, told apart by their width."""

from pathlib import Path

from ..common.problem import Problem
from ..networks.sizes import CLIPVisionConfig
from .layouts import Part

KNOWN_ENCODERS = {  # OpenCLIP ViT-H, OpenCLIP ViT-bigG, OpenAI's ViT-L (LAION's has the same shapes but gelu)
    1280: CLIPVisionConfig(),
    1664: CLIPVisionConfig(width=1664, layers=48, mlp_width=8192, projection_dim=1280),
    1024: CLIPVisionConfig(width=1024, layers=24, mlp_width=4096, projection_dim=768, act="quick_gelu")}


def guess(file: Path, width: int) -> str:
    """What to say of an image encoder from `file`; empty where nothing had to be guessed."""
    guessed = width == 1024 and not (file.parent / "config.json").exists()
    return f"{file}: taken for OpenAI's ViT-L/14; LAION's needs its config.json beside it" if guessed else ""


def encoder_by_width(part: Part) -> CLIPVisionConfig:
    """Raises Problem for a width that is not among them: shapes tell neither the heads nor the activation."""
    width = max(part.shapes.get("vision_model.pre_layrnorm.weight", ()), default=0)
    if width not in KNOWN_ENCODERS:
        raise Problem(f"{part.path}: an image encoder {width} wide without its config.json, which tells its heads "
                      "and activation; put that beside it")
    return KNOWN_ENCODERS[width]
