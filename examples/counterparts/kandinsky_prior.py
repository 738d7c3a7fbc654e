"""Kandinsky 2.2's prior: from a prompt to the CLIP image embedding that a picture of it might have.

    isadca evaluate weights/demo/pairs -o results --systems isadca,examples/counterparts/kandinsky_prior.py:SYSTEM

The paper's ablation (Fig. 4, row 4) feeds such an embedding to ip-adapter_sd15_vit-G instead of the reference's. In
Python, with `parts = load_prior("weights/demo/prior")`:

    isadca.vary(model, ref, prompt, image_embeds=embed_prompt(*parts, prompt))

A small diffusion model works on the embedding itself: a transformer predicts the clean one from a noised one, the text
and the time; UnCLIP's sampler walks the noise down.

Attribute names are diffusers' checkpoint keys. References: unCLIP, arXiv 2204.06125; kandinsky-2-2-prior.
Shapes: B rows, E embedding width, L text tokens, S = L + 4 tokens in all, W transformer width.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from isadca import Model, Problem
from isadca.evaluation.systems import Draw, System, find_extra, vary_once
from isadca.loading.checkpoints import load_into, without_values
from isadca.loading.load import build, find_part
from isadca.methods import ISADCA
from isadca.networks.clip import CLIPText
from isadca.networks.layers import Attention, FeedForward, TimestepEmbedding, timestep_embedding
from isadca.networks.tokenizer import Tokenizer


@dataclass(frozen=True)
class PriorConfig:
    embed_dim: int = 1280
    n_heads: int = 32
    head_dim: int = 64
    layers: int = 20
    max_tokens: int = 77


class TextCondition(NamedTuple):
    """A text encoder's answer to B prompts."""

    states: Tensor  # (B,L,E) last hidden states, normed
    embed: Tensor   # (B,E) projected
    mask: Tensor    # (B,L) true for the prompt's own tokens, false for padding


class GELU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class PriorBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, bias=True)
        self.norm3 = nn.LayerNorm(dim)  # there is no norm2, as there is no cross-attention
        self.ff = FeedForward(dim, GELU)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        masked = lambda q, k, v, site: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed, masked)
        return x + self.ff(self.norm3(x))


class Prior(nn.Module):
    def __init__(self, config: PriorConfig = PriorConfig()):
        super().__init__()
        self.config = config
        width, embed, tokens = config.n_heads * config.head_dim, config.embed_dim, config.max_tokens + 4
        self.time_embedding = TimestepEmbedding(width, width)
        self.proj_in = nn.Linear(embed, width)
        self.embedding_proj = nn.Linear(embed, width)
        self.encoder_hidden_states_proj = nn.Linear(embed, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer_blocks = nn.ModuleList(PriorBlock(width, config.n_heads) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, embed)
        self.clip_mean = nn.Parameter(torch.zeros(1, embed))
        self.clip_std = nn.Parameter(torch.ones(1, embed))

    def forward(self, x: Tensor, t: Tensor | int, text: TextCondition) -> Tensor:
        """The clean embedding, (B,E), that is predicted for x (B,E) at time t, given the text."""
        width = self.positional_embedding.shape[2]
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        temb = self.time_embedding(timestep_embedding(t, width).to(x.dtype))
        tokens = torch.cat([self.encoder_hidden_states_proj(text.states), self.embedding_proj(text.embed)[:, None],
                            temb[:, None], self.proj_in(x)[:, None], self.prd_embedding.expand(len(x), 1, -1)], dim=1)
        tokens = tokens + self.positional_embedding
        mask = attention_mask(text.mask).to(x.dtype)
        for block in self.transformer_blocks:
            tokens = block(tokens, mask)
        return self.proj_to_clip_embeddings(self.norm_out(tokens)[:, -1])


def attention_mask(text_mask: Tensor) -> Tensor:
    """(B,L) -> (B,1,S,S), to be added to the scores: causal, with padding masked. The last four tokens are
    never masked. Both masks are -10,000 rather than -∞, and add up."""
    own = F.pad(text_mask.bool(), (0, 4), value=True)
    later = torch.ones(own.shape[1], own.shape[1], device=own.device).triu(1)
    return -1e4 * (later + (~own)[:, None, None, :].float())


TRAIN_STEPS = 1000


def alpha_bar(t: int) -> float:
    """The cosine schedule (arXiv 2102.09672), with each β at most 0.999; 1 before t = 0."""
    level = lambda s: math.cos((s / TRAIN_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2
    product = 1.0
    for s in range(t + 1):
        product *= 1 - min(1 - level(s + 1) / level(s), 0.999)
    return product


def times(n: int) -> list[int]:
    """n training steps from 999 down to 0, evenly spread."""
    return [round(i * (TRAIN_STEPS - 1) / (n - 1)) for i in reversed(range(n))]


def posterior_step(x: Tensor, x0: Tensor, t: int, t_prev: int, noise: Tensor | None) -> Tensor:
    """A sample of q(x_prev | x_t, x_0), DDPM, arXiv 2006.11239, with a stride; the mean if `noise` is None."""
    level, before = alpha_bar(t), alpha_bar(t_prev)
    beta = 1 - level / before
    mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - level)
    if noise is None:
        return mean
    variance = max((1 - before) / (1 - level) * beta, 1e-20)
    return mean + math.sqrt(variance) * noise


def embed_prompt(prior: Prior, encoder: CLIPText, tokenizer: Tokenizer, prompt: str, steps: int = 25,
                 guidance: float = 4.0, seed: int = 0) -> Tensor:
    """An image embedding for a prompt, (1,E): what `image_embeds` of the loop takes. Guided on the predicted x_0."""
    text, device = text_condition(encoder, tokenizer, ["", prompt]), prior.clip_mean.device
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(1, prior.config.embed_dim, generator=generator).to(device, prior.clip_mean.dtype)
    x = normal()
    grid = times(steps)
    for t, t_prev in zip(grid, [*grid[1:], -1]):
        blank, wanted = prior(x.expand(2, -1), t, text).chunk(2)
        x0 = (blank + guidance * (wanted - blank)).clamp(-10, 10)
        x = posterior_step(x, x0, t, t_prev, normal() if t > 0 else None)
    return x * prior.clip_std + prior.clip_mean


def text_condition(encoder: CLIPText, tokenizer: Tokenizer, prompts: list[str]) -> TextCondition:
    ids = tokenizer(prompts).to(next(encoder.parameters()).device)
    lengths = (ids == encoder.config.vocab_size - 1).int().argmax(1)  # the first end of text belongs to the prompt
    own = torch.arange(ids.shape[1], device=ids.device) <= lengths[:, None]
    return TextCondition(encoder(ids), encoder.embed(ids), own)


# ---- from its folder, and as a system ----------------------------------------------------------------------------

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


def prepare(folder: Path, model: Model, weights: Path, steps: int) -> Draw:
    """DCA sees the image embedding that the prior predicts from the prompt."""
    prior, encoder, tokenizer = load_prior(folder, model.dtype, model.device)
    if model.ip_adapter is None or model.ip_adapter.embed_dim != prior.config.embed_dim:
        path = find_extra(weights, "ip-adapter_sd15_vit-G.safetensors")
        if path is None:
            raise Problem(f"{weights}: the prior's embeddings are {prior.config.embed_dim} wide and need an IP-Adapter "
                          "that reads them; put ip-adapter_sd15_vit-G.safetensors in it or beside it")
        part = find_part(path, "ip_adapter", model.dtype)
        model = replace(model, ip_adapter=load_into(build(part), part, model.dtype, model.device))

    def draw(image: Image.Image, prompt: str, seed: int) -> Image.Image:
        embeds = embed_prompt(prior, encoder, tokenizer, prompt, seed=seed)
        return vary_once(ISADCA, model, image, prompt, seed, steps, image_embeds=embeds)
    return draw


SYSTEM = System("isadca-prior", "Ours, with prior", prepare, needs="prior")
