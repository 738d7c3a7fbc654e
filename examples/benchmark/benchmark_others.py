"""The other side of benchmark.py: diffusers on the same weights, and RIVAL's row layout built from diffusers' parts.

    python benchmark_others.py job REF PROMPT OUT FOLDER    # an inversion, then a picture with IP-Adapter
    python benchmark_others.py load FOLDER                  # load a pipeline; prints seconds and megabytes

RIVAL (dvlab-research/RIVAL) inverts with one row a step and generates with four, [reference, picture] × guidance
halves, one picture at a time. AdaIN, a few adds, is left out. diffusers attends with its own default, torch's SDPA.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

STEPS, ALIGN = 50, 600


def load_pipeline(folder: str | Path, device: str = "cpu",
                  dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def context(pipe: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                         max_length=pipe.text_encoder.config.max_position_embeddings).input_ids
    return pipe.text_encoder(ids.to(pipe.device))[0]


def invert(pipe: StableDiffusionPipeline, pixels: Tensor, steps: int = STEPS) -> list[Tensor]:
    """The chain, clean first: one row a step, no guidance."""
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    chain = [pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor]
    null = context(pipe, [""])
    for t in scheduler.timesteps:
        eps = pipe.unet(chain[-1], t, null, return_dict=False)[0]
        chain.append(scheduler.step(eps, t, chain[-1]).prev_sample)
    return chain


class RivalAttention:
    """Self-attention of the rows [ref_u, gen_u, ref_c, gen_c]: the reference alone while t > 600, then both."""

    t = 0

    def __call__(self, attn, x: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
        k_ref, v_ref = (y[[0, 0, 2, 2]] for y in (k, v))
        k, v = (k_ref, v_ref) if self.t > ALIGN else (torch.cat([k_ref, k], 2), torch.cat([v_ref, v], 2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](y)


def rival(pipe: StableDiffusionPipeline, chain: list[Tensor], prompt: str, guidance: float = 7.0) -> Tensor:
    """Four rows a step; the reference's are read from the chain. -> pixels."""
    before, attention = pipe.unet.attn_processors, RivalAttention()
    pipe.unet.set_attn_processor({name: attention if ".attn1." in name else processor
                                  for name, processor in before.items()})
    scheduler, told = DDIMScheduler.from_config(pipe.scheduler.config), context(pipe, ["", "", "", prompt])
    scheduler.set_timesteps(len(chain) - 1)
    z = chain[-1]
    for i, t in enumerate(scheduler.timesteps):
        ref = chain[len(chain) - 1 - i]
        attention.t = int(t)
        eps = pipe.unet(torch.cat([ref, z, ref, z]), t, told, return_dict=False)[0]
        _, eps_u, _, eps_c = eps.chunk(4)
        z = scheduler.step(eps_u + guidance * (eps_c - eps_u), t, z).prev_sample
    pipe.unet.set_attn_processor(before)
    return pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample


@torch.no_grad()
def job(ref: str, prompt: str, out: str, folder: str) -> None:
    """What a user of diffusers would write: invert the picture, then IP-Adapter with guidance from its z_T."""
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
    pipe = load_pipeline(folder)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    image = Image.open(ref).convert("RGB").resize((size, size))
    chain = invert(pipe, pipe.image_processor.preprocess(image))
    pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(Path(folder) / "image_encoder")
    side = pipe.image_encoder.config.image_size
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    [adapter] = Path(folder).glob("ip-adapter*.safetensors")
    pipe.load_ip_adapter(folder, subfolder="", weight_name=adapter.name, image_encoder_folder=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe(prompt, ip_adapter_image=image, num_inference_steps=STEPS, guidance_scale=7.0,
         latents=chain[-1]).images[0].save(out)
    print(peak_megabytes())


def load(folder: str) -> None:
    gc.collect()  # of what the imports left
    began = time.perf_counter()
    pipe = load_pipeline(folder)
    took = time.perf_counter() - began
    touched = sum(float(p.flatten()[0]) for net in (pipe.unet, pipe.vae, pipe.text_encoder) for p in net.parameters())
    print(json.dumps({"seconds": took, "MB": peak_megabytes(), "touched": touched}))


def peak_megabytes() -> float:
    """The most memory that this process held at once. (What getrusage says is inherited from the parent, on Linux.)"""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    {"job": job, "load": load}[sys.argv[1]](*sys.argv[2:])
