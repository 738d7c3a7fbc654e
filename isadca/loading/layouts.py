"""What a weights file says of itself before a tensor is read, and the layouts whose names are also ours: diffusers',
transformers' and h94's (IP-Adapter's publisher). The layouts with other names are in original.py."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

FLOATS = ("F16", "BF16", "F32", "F64")


class Stored(NamedTuple):
    """A tensor in a file: its name there, and what the header says of it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Header(NamedTuple):
    """All tensors of a file by name. `path` is the file; of several, the index.json that lists them."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Part:
    """One network's share of a file. `tensors` are by our names."""

    kind: str
    layout: str
    header: Header
    tensors: dict[str, Stored]

    @property
    def path(self) -> Path:
        return self.header.path

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    @cached_property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})


class Layout(NamedTuple):
    """How one network is stored: `mark` is a key that only this layout has; `rules` rename what follows `prefix`."""

    kind: str
    name: str
    mark: str
    prefix: str = ""
    rules: list = []


PLAIN = [Layout("unet", "diffusers", "down_blocks.0.resnets.0.time_emb_proj.weight"),
         Layout("vae", "diffusers", "encoder.mid_block.attentions.0.to_q.weight"),
         Layout("text", "transformers", "text_model.final_layer_norm.weight"),
         Layout("vision", "transformers", "vision_model.embeddings.class_embedding"),
         Layout("ip_adapter", "h94", "ip_adapter.1.to_k_ip.weight"),
         Layout("prior", "diffusers", "prd_embedding")]
PREFIXES = ("model.diffusion_model.", "first_stage_model.", "vae.", "cond_stage_model.transformer.")  # in original.py

# what a layout without a prefix may hold: one file may have both halves of a CLIP
HALVES = {"vision": r"(vision_model|visual_projection)\.",
          "text": r"(text_model|text_projection|embeddings|encoder|final_layer_norm)\."}
IGNORED = r"position_ids$|^loss\.|^model_ema\.|^lora_(unet|te)"  # computed; for training; merged, as such files say


def same_shape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    return theirs == ours or theirs == ours + (1, 1)  # LDM keeps the VAE's linear layers as 1×1 convolutions
