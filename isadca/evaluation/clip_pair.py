"""Both halves of a CLIP, as a judge of pictures and texts."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..common.images import clip_pixels
from ..common.problem import Problem
from ..loading.checkpoints import load_into, without_values
from ..loading.load import build, default_weights, find_part
from ..networks.clip import CLIPText, CLIPVision
from ..networks.sizes import CLIPTextConfig
from ..networks.tokenizer import Tokenizer


class CLIPPair(NamedTuple):
    text: CLIPText
    vision: CLIPVision
    tokenizer: Tokenizer

    def embed_text(self, text: str) -> Tensor:
        """-> (1,P)"""
        return self.text.embed(self.tokenizer([text]).to(self._device))

    def embed_picture(self, picture: Image.Image) -> Tensor:
        """-> (1,P)"""
        return self.vision(clip_pixels(picture, self.vision.config.image_size).to(self._device))[0]

    @property
    def _device(self) -> torch.device:
        return next(self.vision.parameters()).device


def load_clip(folder: str | Path, device: torch.device | str = "cpu") -> CLIPPair:
    """Both halves from one file, as openai/clip-vit-large-patch14 publishes them; float32.

    Without a config.json it has to be that one: shapes do not tell the number of heads or the activation. The
    vocabulary is the folder's, or CLIP's own."""
    folder = Path(folder)
    text, vision = (find_part(folder, kind, torch.float32) for kind in ("text", "vision"))
    if "text_projection.weight" not in text.shapes:
        raise Problem(f"{text.path}: its texts and pictures are not embedded in one space; the metrics take a "
                      "whole CLIP, such as openai/clip-vit-large-patch14")
    with without_values():
        known = CLIPText(CLIPTextConfig(projection_dim=768))
    networks = [build(text) if (text.path.parent / "config.json").is_file() else known, build(vision)]
    text_net, vision_net = (load_into(net, part, torch.float32, device) for net, part in zip(networks, (text, vision)))
    words = folder if (folder / "vocab.json").is_file() else default_weights().parent / "tokenizer"
    return CLIPPair(text_net, vision_net, Tokenizer.from_folder(words, text_net.config.max_tokens))
