"""Kandinsky 2.2's prior, from its folder to its networks: what `vary --prior` and the paper's ablation need."""

from pathlib import Path

import torch

from ..common.problem import Problem
from ..networks.clip import CLIPText
from ..networks.prior import Prior, PriorConfig
from ..networks.tokenizer import Tokenizer
from .checkpoints import load_into, without_values
from .load import build, find_part


def load_prior(folder: str | Path, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu") -> tuple[Prior, CLIPText, Tokenizer]:
    """Kandinsky 2.2's prior folder: prior/, text_encoder/ and tokenizer/. Raises Problem where they do not fit."""
    folder = Path(folder)
    part = find_part(folder / "prior", "prior", dtype)
    with without_values():
        net = Prior(_sizes(part.path, part.shapes))
    prior = load_into(net, part, dtype, device)
    text = find_part(folder / "text_encoder", "text", dtype)
    encoder = load_into(build(text), text, dtype, device)
    if encoder.config.projection_dim != prior.config.embed_dim:
        raise Problem(f"{text.path}: a text encoder that projects to {encoder.config.projection_dim}, the prior reads "
                      f"{prior.config.embed_dim}; they belong to different models")
    return prior, encoder, Tokenizer.from_folder(folder / "tokenizer", encoder.config.max_tokens)


def _sizes(path: Path, shapes: dict[str, tuple[int, ...]]) -> PriorConfig:
    """Read off the shapes; heads are 64 wide, which the file cannot tell."""
    try:
        width, embed = shapes["proj_in.weight"]
        layers = len({key.split(".")[1] for key in shapes if key.startswith("transformer_blocks.")})
        return PriorConfig(embed, width // 64, 64, layers, shapes["positional_embedding"][1] - 4)
    except (KeyError, ValueError, IndexError):
        raise Problem(f"{path}: is not Kandinsky's prior (no proj_in and positional_embedding of its shapes)") from None
