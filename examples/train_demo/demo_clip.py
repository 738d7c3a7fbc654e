"""The demo's CLIP pair: the contrastive loss, on random batches and on hard ones, and its stages of train_demo.py."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from demo_files import CLIP_TEXT, CLIP_VISION, load_network, save_network
from demo_fit import SCENES, Loss, Plan, Studio, fit
from demo_groups import Groups
from torch import Tensor, nn

from isadca.networks.clip import CLIPText, CLIPVision
from isadca.common.images import CLIP_MEAN, CLIP_STD


class CLIP(nn.Module):
    """Both encoders and the temperature, for the contrastive loss."""

    def __init__(self):
        super().__init__()
        self.text, self.vision = CLIPText(CLIP_TEXT), CLIPVision(CLIP_VISION)
        self.log_scale = nn.Parameter(torch.tensor(2.6))
        for name, p in self.named_parameters():
            if "embedding" in name and p.ndim <= 2:
                nn.init.normal_(p, std=0.02)

    def loss(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Which caption belongs to which picture of the batch, both ways round."""
        pictures, texts = self.vision(pixels)[0], self.text.embed(ids)
        scores = F.normalize(pictures.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        scores, right = scores * self.log_scale.exp().clamp(max=100), torch.arange(len(pixels), device=scores.device)
        return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def clip_pixels(studio: Studio, index: np.ndarray) -> Tensor:
    mean, std = (torch.tensor(c, device=studio.device).view(1, 3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return ((studio.pixels(index) + 1) / 2 - mean) / std


def contrastive(studio: Studio, plan: Plan) -> Loss:
    """Random scenes. Every process has the whole batch, since a share of it would have too few negatives."""
    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch)
        ids = studio.captions(index, rng)[:, :16]  # the rest is padding, after what is read
        return net.loss(clip_pixels(studio, index), ids)
    return loss


def hard_contrastive(studio: Studio, plan: Plan) -> Loss:
    """Half of each batch in groups that differ in one attribute (see demo_groups.py)."""
    groups = Groups(studio.scenes)

    def loss(net, rng):
        index, texts = groups.batch(plan.batch, rng)
        ids = studio.tokenizer(texts).to(studio.device)[:, :16]
        with studio.autocast():
            return net.loss(clip_pixels(studio, index), ids)
    return loss


def train_clip(studio: Studio, plan: Plan) -> None:
    save_pair(studio, fit("clip", CLIP(), contrastive(studio, plan), studio, plan))


def train_words(studio: Studio, plan: Plan) -> None:
    """The pair goes on with hard groups, which tell apart the words that random batches leave alike."""
    save_pair(studio, fit("words", saved_pair(studio), hard_contrastive(studio, plan), studio, plan))


def train_vision(studio: Studio, plan: Plan) -> None:
    """The image encoder goes on against the locked text encoder (LiT, arXiv 2111.07991), which the UNet reads."""
    net = saved_pair(studio)
    net.text.requires_grad_(False)
    ema = fit("vision", net, hard_contrastive(studio, plan), studio, plan)
    save_network(studio.folder / "image_encoder", ema.vision, CLIP_VISION)


def save_pair(studio: Studio, pair: CLIP) -> None:
    save_network(studio.folder / "image_encoder", pair.vision, CLIP_VISION)
    save_network(studio.folder / "text_encoder_with_projection", pair.text, CLIP_TEXT)
    bare = replace(CLIP_TEXT, projection_dim=None)
    plain = CLIPText(bare)
    plain.load_state_dict({k: v for k, v in pair.text.state_dict().items() if k != "text_projection.weight"})
    save_network(studio.folder / "text_encoder", plain, bare)


def saved_pair(studio: Studio) -> CLIP:
    """The pair from its files. They do not hold the temperature; a trained pair's is about e^3.5."""
    pair = CLIP()
    pair.text.load_state_dict(load_network(studio.folder / "text_encoder_with_projection", CLIPText).state_dict())
    pair.vision.load_state_dict(load_network(studio.folder / "image_encoder", CLIPVision).state_dict())
    nn.init.constant_(pair.log_scale, 3.5)
    return pair
