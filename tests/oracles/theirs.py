"""The demo checkpoint as diffusers and transformers run it: parts for oracles that share no code with isadca.

Not a test file. In float64 the schedulers get their noise levels in float64, too (diffusers has them in float32).
"""

from dataclasses import dataclass

import numpy as np
import torch
from conftest import DEMO
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])  # CLIP's
STD = np.float32([0.26862954, 0.26130258, 0.27577711])
ADAPTER = "ip-adapter_demo.safetensors"


@dataclass
class Theirs:
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    image_encoder: CLIPVisionModelWithProjection
    tokenizer: CLIPTokenizer
    dtype: torch.dtype

    def context(self, *prompts: str) -> Tensor:
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.tokenizer.model_max_length).input_ids
        return self.text_encoder(ids)[0]

    def encode(self, image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        return self.vae.encode(pixels.to(self.dtype)).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> np.ndarray:
        pixels = self.vae.decode(z / self.vae.config.scaling_factor).sample
        return ((pixels[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().int().numpy()

    def embed(self, image) -> Tensor:
        """CLIP's embedding of a picture that has the encoder's size already. (1,P)."""
        assert image.size == (self.image_encoder.config.image_size,) * 2
        pixels = torch.from_numpy((np.asarray(image, np.float32) / 255 - MEAN) / STD).permute(2, 0, 1)[None]
        return self.image_encoder(pixels.to(self.dtype)).image_embeds

    def scheduler(self, kind: type = DDIMScheduler, steps: int | None = None):
        scheduler = kind.from_pretrained(DEMO / "scheduler")
        if self.dtype == torch.float64:
            root = torch.linspace(scheduler.config.beta_start**0.5, scheduler.config.beta_end**0.5,
                                  scheduler.config.num_train_timesteps, dtype=torch.float64)
            scheduler.alphas_cumprod = (1 - root**2).cumprod(0)
            scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
        if steps:
            scheduler.set_timesteps(steps)
        return scheduler

    def invert(self, image, steps: int, prompt: str = "") -> Tensor:
        """The chain of diffusers' own inverse scheduler, (steps + 1,4,h,w), clean first."""
        scheduler = self.scheduler(DDIMInverseScheduler, steps)
        chain, context = [self.encode(image)], self.context(prompt)
        for t in scheduler.timesteps:
            eps = self.unet(chain[-1], t, context).sample
            chain.append(scheduler.step(eps, t, chain[-1]).prev_sample)
        return torch.cat(chain)

    def ip_keys_values(self, image) -> dict[str, tuple[Tensor, Tensor]]:
        """K' and V' of each cross-attention, rows [no image, image], through the adapter as diffusers loads it."""
        pipe, embeds = pipeline(load(self.dtype), adapter=True), self.embed(image)
        [project] = pipe.unet.encoder_hid_proj.image_projection_layers
        tokens = project(torch.cat([torch.zeros_like(embeds), embeds]))
        heads = pipe.unet.config.attention_head_dim
        layers = {name.removesuffix(".processor"): layer for name, layer in pipe.unet.attn_processors.items()}
        return {name: (split(layer.to_k_ip[0](tokens), heads), split(layer.to_v_ip[0](tokens), heads))
                for name, layer in layers.items() if "attn2" in name}


def load(dtype: torch.dtype = torch.float32) -> Theirs:
    kinds = [(UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"),
             (CLIPVisionModelWithProjection, "image_encoder")]
    parts = [kind.from_pretrained(DEMO / folder, low_cpu_mem_usage=False) for kind, folder in kinds]
    return Theirs(*(part.to(dtype).eval().requires_grad_(False) for part in parts),
                  CLIPTokenizer.from_pretrained(DEMO / "tokenizer"), dtype)


def pipeline(theirs: Theirs, adapter: bool) -> StableDiffusionPipeline:
    """With `adapter`, the UNet of `theirs` has the IP-Adapter from then on."""
    pipe = StableDiffusionPipeline(theirs.vae, theirs.text_encoder, theirs.tokenizer, theirs.unet,
                                   theirs.scheduler(), None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.load_ip_adapter(DEMO, subfolder="", weight_name=ADAPTER, image_encoder_folder=None)
        pipe.unet.to(theirs.dtype).requires_grad_(False)
    return pipe


# ---- attention, written out ------------------------------------------------------------------------------------

def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


class Processor:
    """A diffusers attention processor around `rule(q, k, v, t) -> y`. The time step is an argument of each call:
    unet(..., cross_attention_kwargs={"t": t})."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, t=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        y = self.rule(*(split(x, attn.heads) for x in (q, k, v)), t)
        return attn.to_out[0](y.transpose(1, 2).flatten(2))


def plain(q: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
    return softmax_attention(q, k, v)


def install(unet: UNet2DConditionModel, rule_of) -> None:
    """`rule_of(name)` is the rule of the layer with that checkpoint prefix."""
    unet.set_attn_processor({name: Processor(rule_of(name.removesuffix(".processor")))
                             for name in unet.attn_processors})


def noise_alignment(eps: Tensor, eps_ref: Tensor) -> Tensor:
    """RIVAL's AdaIN, channel by channel. (1,4,h,w) both."""
    out = torch.empty_like(eps)
    for c in range(eps.shape[1]):
        x, ref = eps[0, c], eps_ref[0, c]
        std, std_ref = ((y.var(unbiased=True) + 1e-5).sqrt() for y in (x, ref))
        out[0, c] = (x - x.mean()) / std * std_ref + ref.mean()
    return out


def execution_order(unet: UNet2DConditionModel) -> list[str]:
    """The names of the self-attentions in the order in which a forward pass calls them. Leaves plain attention."""
    install(unet, lambda name: plain)
    names, hooks = [], []
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: names.append(name)))
    side, config = 2 ** len(unet.config.block_out_channels), unet.config
    unet(torch.zeros(1, config.in_channels, side, side, dtype=unet.dtype), 1,
         torch.zeros(1, 1, config.cross_attention_dim, dtype=unet.dtype))
    for hook in hooks:
        hook.remove()
    return names
