"""The other systems' published files: from a path to the networks. Names and strictness as in the core's loading."""

from pathlib import Path
from typing import Any

import torch

from ..common.problem import Problem
from ..ddim import Schedule, ScheduleConfig
from ..loading.checkpoints import load_into, read_header, take, without_values
from ..loading.layouts import Layout
from ..loading.load import build, find_part, pick_file, vae_dtype
from ..loading.original import UNET_RULES
from ..networks.clip import CLIPText
from ..networks.model import Model
from ..networks.sizes import UNetConfig
from ..networks.tokenizer import Tokenizer
from .controlnet import ControlNet
from .prior import Prior, PriorConfig

CONTROLNET_RULES = [
    (r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
    (r"^input_hint_block\.14\.", "controlnet_cond_embedding.conv_out."),
    (r"^input_hint_block\.(\d+)\.", lambda m: f"controlnet_cond_embedding.blocks.{int(m[1]) // 2 - 1}."),
    (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
    *UNET_RULES]
CONTROLNETS = [  # their second layout is the first without its prefix
    Layout("controlnet", "LDM", "control_model.input_hint_block.0.weight", "control_model.", CONTROLNET_RULES),
    Layout("controlnet", "LDM", "input_hint_block.0.weight", "", CONTROLNET_RULES),
    Layout("controlnet", "diffusers", "controlnet_cond_embedding.conv_in.weight")]


def load_controlnet(path: str | Path, config: UNetConfig = UNetConfig(), dtype: torch.dtype = torch.float32,
                    device: torch.device | str = "cpu") -> ControlNet:
    """A ControlNet file or folder, in diffusers' layout or LDM's. `config` is the UNet's that it belongs to: a
    ControlNet copies its half. Raises Problem for other files and other UNets."""
    path = Path(path)
    path = pick_file(path, dtype) if path.is_dir() else path
    header = read_header(path)
    layout = next((layout for layout in CONTROLNETS if layout.mark in header.tensors), None)
    if layout is None:
        raise Problem(f"{path}: is not a ControlNet, it has no controlnet_cond_embedding or input_hint_block; "
                      "the paper's comparison uses control_v11e_sd15_shuffle")
    part = take(layout, header)
    widening = ["conv_in", *(f"blocks.{i}" for i in range(1, len(part.shapes), 2))]  # every other block widens
    keys = [f"controlnet_cond_embedding.{name}.weight" for name in widening]
    channels = tuple(part.shapes[key][0] for key in keys if key in part.shapes)
    with without_values():
        net = ControlNet(config, channels)
    return load_into(net, part, dtype, device)


def load_prior(folder: str | Path, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu") -> tuple[Prior, CLIPText, Tokenizer]:
    """Kandinsky 2.2's prior folder: prior/, text_encoder/ and tokenizer/."""
    folder = Path(folder)
    part = find_part(folder / "prior", "prior", dtype)
    with without_values():
        net = Prior(_prior_config(part.path, part.shapes))
    prior = load_into(net, part, dtype, device)
    text = find_part(folder / "text_encoder", "text", dtype)
    encoder = load_into(build(text), text, dtype, device)
    if encoder.config.projection_dim != prior.config.embed_dim:
        raise Problem(f"{text.path}: a text encoder that projects to {encoder.config.projection_dim}, the prior reads "
                      f"{prior.config.embed_dim}; they belong to different models")
    return prior, encoder, Tokenizer.from_folder(folder / "tokenizer", encoder.config.max_tokens)


def load_image_variations(folder: str | Path, dtype: torch.dtype = torch.float32,
                          device: torch.device | str = "cpu") -> Model:
    """SD image-variations: unet/, vae/ and image_encoder/. The model has no text encoder."""
    folder, networks, files = Path(folder), {}, {}
    for kind, name in (("unet", "unet"), ("vae", "vae"), ("vision", "image_encoder")):
        part = find_part(folder / name, kind, dtype)
        own = vae_dtype(dtype) if kind == "vae" else dtype
        networks[kind], files[kind] = load_into(build(part), part, own, device), part.path
    unet, vision = networks["unet"], networks["vision"]
    if vision.config.projection_dim != unet.config.context_dim:
        raise Problem(f"{files['vision']}: an image encoder that projects to {vision.config.projection_dim}, the UNet "
                      f"expects {unet.config.context_dim}; they belong to different models")
    schedule = Schedule(ScheduleConfig())
    nothing: Any = None  # it reads no text
    return Model(unet=unet, vae=networks["vae"], text=nothing, tokenizer=nothing, schedule=schedule, vision=vision,
                 ip_adapter=None, device=torch.device(device), dtype=dtype, files=files)


def _prior_config(path: Path, shapes: dict[str, tuple[int, ...]]) -> PriorConfig:
    """The sizes, read off the shapes; heads are 64 wide, which the file cannot tell."""
    try:
        width, embed = shapes["proj_in.weight"]
        layers = len({key.split(".")[1] for key in shapes if key.startswith("transformer_blocks.")})
        return PriorConfig(embed, width // 64, 64, layers, shapes["positional_embedding"][1] - 4)
    except (KeyError, ValueError, IndexError):
        raise Problem(f"{path}: is not Kandinsky's prior (no proj_in and positional_embedding of its shapes)") from None

