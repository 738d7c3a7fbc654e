"""Train the demo checkpoint, weights/demo, from nothing: tokenizer, VAE, CLIP pair, judge, UNet, IP-Adapter.

    python examples/train_demo/train_demo.py OUT                      # every stage; resumes where it was stopped
    python examples/train_demo/train_demo.py OUT --stages unet        # one stage (those before it must be done)
    python examples/train_demo/train_demo.py OUT --stages unet --go-on --steps 2000 --rate 5e-4  # learn more

Uses a GPU when there is one. On two CPU cores it takes about three hours, less with one thread a process and an
allocator that keeps its pages:

    OMP_NUM_THREADS=1 LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:10000 \\
        torchrun --nproc-per-node 2 examples/train_demo/train_demo.py OUT --bf16

`--bf16`, for the UNet's passes, pays on CPUs with avx512_bf16 and on GPUs. OUT becomes a folder in Stable Diffusion
1.5's layout, with an IP-Adapter; OUT/.train holds the state to resume from. The world is demo_world.py; what the result
can do is measured by measure_demo.py.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import demo_world as world
import numpy as np
import torch
import torch.distributed as dist
from demo_clip import clip_pixels, train_clip, train_vision, train_words
from demo_files import (CLIP_VISION, MAX_TOKENS, UNET, VAE_SIZES, load_network, save_curves, save_network,
                        save_pipeline, save_tensors)
from demo_fit import RANK, RANKS, SCENES, Plan, Studio, fit
from demo_judge import HEADS, Judge, judge_loss
from PIL import Image
from torch import Tensor, nn

from isadca.attention import Attend, dca
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.ddim import ScheduleConfig
from isadca.ddim import Schedule
from isadca.common.files import save_png
from isadca.networks.ip_adapter import IPAdapter, numbered
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

PLANS = {"vae": Plan(6000, 16, 1e-3), "decoder": Plan(2500, 8, 6e-4), "clip": Plan(1600, 64, 1e-3),
         "words": Plan(3000, 64, 1e-3), "judge": Plan(1500, 48, 2e-3), "unet": Plan(7000, 32, 8e-4, 300),
         "vision": Plan(2500, 64, 6e-4), "adapter": Plan(1500, 32, 1e-3), "references": Plan(0, 0, 0)}
REFERENCES = [("cat", "3d", "green", "checkered"), ("rocket", "3d", "blue", "dotted"),
              ("pig", "flat", "green", "dotted"), ("apple", "3d", "yellow", "striped")]


# ---- stages ----------------------------------------------------------------------------------------------------

def train_vae(studio: Studio, plan: Plan) -> None:
    """On 32 × 32 crops: what an autoencoder needs is steps, not pixels."""
    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch // RANKS)
        left, top = rng.integers(0, 33, size=2)
        x = studio.pixels(index)[:, :, top:top + 32, left:left + 32]
        mean, logvar = net.posterior(x)
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).float().mean()
        back = net.decoder(net.post_quant_conv(z))
        return (back.float() - x).abs().mean() + (back.float() - x).pow(2).mean() + 3e-4 * kl

    ema = fit("vae", VAE(VAE_SIZES), loss, studio, plan)
    with torch.no_grad():
        spread = ema.posterior(studio.pixels(np.arange(500)))[0].std().item()
    save_network(studio.folder / "vae", ema, replace(VAE_SIZES, scaling_factor=1 / spread))


def train_decoder(studio: Studio, plan: Plan) -> None:
    """The decoder goes on alone, on whole pictures: the latents, and what was learned from them, stay as they are.

    The loss is the negative PSNR. Generated latents are never quite clean, so these get some noise, too.
    """
    def loss(net, rng):
        x = studio.pixels(rng.integers(SCENES, size=plan.batch // RANKS))
        with torch.no_grad():
            mean, logvar = net.posterior(x)
            z = mean + float(rng.uniform(0, 0.6)) * torch.randn_like(mean) * (0.5 * logvar).exp()
        back = net.decoder(net.post_quant_conv(z))
        return (back.float() - x).pow(2).mean((1, 2, 3)).add(1e-5).log().mean() * 10 / math.log(10) + 100

    net = load_network(studio.folder / "vae", VAE)
    for part in (net.decoder, net.post_quant_conv):
        part.requires_grad_(True)
    save_network(studio.folder / "vae", fit("decoder", net, loss, studio, plan), net.config)


def train_judge(studio: Studio, plan: Plan) -> None:
    ema = fit("judge", Judge(), judge_loss(studio.scenes, studio.pixels, plan.batch // RANKS), studio, plan)
    save_network(studio.folder / "judge", ema)


def latents(studio: Studio) -> Tensor:
    """Every scene's clean latent, (SCENES,4,16,16), made once."""
    path = studio.state / "latents.pt"
    if not path.exists():
        vae = load_network(studio.folder / "vae", VAE).to(studio.device)
        with torch.no_grad():
            parts = [vae.encode(studio.pixels(i)) for i in np.array_split(np.arange(SCENES), SCENES // 20)]
        torch.save(torch.cat(parts).cpu(), f"{path}.{RANK}")
        Path(f"{path}.{RANK}").replace(path)
    return torch.load(path, map_location=studio.device, weights_only=True)


class Diffusion:
    """What the UNet's and the adapter's losses share: latents, noise levels, the text as context."""

    def __init__(self, studio: Studio):
        self.studio, self.z0 = studio, latents(studio)
        self.text = load_network(studio.folder / "text_encoder", CLIPText).to(studio.device)
        schedule = Schedule(ScheduleConfig())
        self.alpha_bar = torch.tensor([schedule.alpha_bar(t) for t in range(1000)], device=studio.device).float()

    @torch.no_grad()
    def context(self, index: np.ndarray, rng: np.random.Generator, dropped: float) -> Tensor:
        return self.text(self.studio.captions(index, rng, dropped))

    def error(self, unet: Callable[..., Tensor], index: np.ndarray, context: Tensor, attend: Attend,
              earliest: int = 0) -> tuple[Tensor, Tensor]:
        """The error of the predicted noise, (B,4,16,16), and each scene's min-SNR-5 weight (arXiv 2303.09556)."""
        z0, t = self.z0[index], torch.randint(earliest, 1000, (len(index),), device=self.z0.device)
        level, noise = self.alpha_bar[t].view(-1, 1, 1, 1), torch.randn_like(z0)
        with self.studio.autocast():
            predicted = unet(level.sqrt() * z0 + (1 - level).sqrt() * noise, t, context, attend)
        snr = level / (1 - level)
        return predicted.float() - noise, snr.clamp(max=5) / snr

    def loss(self, *args, **options) -> Tensor:
        error, weight = self.error(*args, **options)
        return (error.pow(2) * weight).mean()


def train_unet(studio: Studio, plan: Plan) -> None:
    diffusion, kernel = Diffusion(studio), studio.attend()

    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch // RANKS)
        return diffusion.loss(net, index, diffusion.context(index, rng, 0.1), kernel)

    unet = UNet(UNET)
    for name, p in unet.named_parameters():  # every residual branch, and the output, starts at zero
        if name.startswith("conv_out.") or ".conv2." in name or ".proj_out." in name:
            nn.init.zeros_(p)
    unet = studio.begin(studio.folder / "unet", unet)
    save_network(studio.folder / "unet", fit("unet", unet, loss, studio, plan), UNET)


def train_adapter(studio: Studio, plan: Plan) -> None:
    """The UNet stays as it is. Most scenes come without text, so that the picture has to be enough. The 200 cleanest
    levels are left out: there the latent itself shows what it is."""
    diffusion, kernel = Diffusion(studio), studio.attend()
    unet = load_network(studio.folder / "unet", UNet).to(studio.device)
    embeds = image_embeds(studio)

    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch // RANKS)
        kept = torch.from_numpy(rng.random((len(index), 1)) >= 0.08).to(embeds.device)
        kv = net.keys_values(net.image_proj(embeds[index] * kept), unet.sites, UNET.n_heads)
        return diffusion.loss(unet, index, diffusion.context(index, rng, 0.8), dca(kv, kernel=kernel), earliest=200)

    path = studio.folder / "ip-adapter_demo.safetensors"
    save_tensors(path, fit("adapter", studio.begin(path, new_adapter(unet)), loss, studio, plan).state_dict())


def new_adapter(unet: UNet, tokens: int = 4) -> IPAdapter:
    """Base layout; the keys and values start as the text's own."""
    width, embed = unet.config.context_dim, CLIP_VISION.projection_dim
    pairs = {number: unet.get_submodule(site.name) for number, site in numbered(unet.sites).items()}
    shapes = {"image_proj.proj.weight": (tokens * width, embed), "image_proj.norm.weight": (width,)}
    shapes |= {f"ip_adapter.{n}.to_k_ip.weight": tuple(attn.to_k.weight.shape) for n, attn in pairs.items()}
    adapter = IPAdapter(shapes)
    for number, attn in pairs.items():
        adapter.ip_adapter[number].to_k_ip.load_state_dict(attn.to_k.state_dict())
        adapter.ip_adapter[number].to_v_ip.load_state_dict(attn.to_v.state_dict())
    return adapter


@torch.no_grad()
def image_embeds(studio: Studio) -> Tensor:
    vision = load_network(studio.folder / "image_encoder", CLIPVision).to(studio.device)
    return torch.cat([vision(clip_pixels(studio, i))[0] for i in np.array_split(np.arange(SCENES), SCENES // 40)])


def save_references(studio: Studio, plan: Plan) -> None:
    """Four held-out scenes to vary and what the judge should see in them; and a sheet of the world."""
    rows = [np.concatenate(studio.pictures[i:i + 16], axis=1) for i in range(0, 96, 16)]
    save_png(Image.fromarray(np.concatenate(rows)), studio.folder / "world.png")
    (studio.folder / "references").mkdir(exist_ok=True)
    rng, said = np.random.default_rng(5), {}
    for noun, style, colour, pattern in REFERENCES:
        scene = world.random_scene(rng, unseen=True, noun=noun, style=style, colour=colour, pattern=pattern,
                                   place="middle")._replace(big=True)
        save_png(Image.fromarray(world.draw(scene, studio.art)), studio.folder / "references" / f"{noun}.png")
        said[f"{noun}.png"] = {name: getattr(scene, name) for name in HEADS}
    (studio.folder / "references" / "scenes.json").write_text(json.dumps(said, indent=1) + "\n")


STAGES = {"vae": train_vae, "decoder": train_decoder, "clip": train_clip, "words": train_words, "judge": train_judge,
          "unet": train_unet, "vision": train_vision, "adapter": train_adapter, "references": save_references}


def main(doc: str, stages: dict[str, Callable[[Studio, Plan], None]], plans: dict[str, Plan]) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--stages", default=",".join(stages), help=f"some of {','.join(stages)}")
    parser.add_argument("--steps", type=int, help="steps of each stage, instead of the plan's")
    parser.add_argument("--rate", type=float, help="learning rate of each stage, instead of the plan's")
    parser.add_argument("--go-on", action="store_true", help="begin with OUT's finished weights instead of nothing")
    parser.add_argument("--art", type=Path, help="where the art is kept (default: OUT/.train)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 in the UNet's passes")
    args = parser.parse_args()
    if RANKS > 1:
        dist.init_process_group("gloo")
    if RANK == 0:
        world.save_tokenizer(args.out / "tokenizer", MAX_TOKENS)
        save_pipeline(args.out)
    studio = Studio(args.out, args.art or args.out / ".train", args.bf16, args.go_on)
    for stage in args.stages.split(","):
        told = {"steps": args.steps, "lr": args.rate}
        plan = plans[stage]._replace(**{key: value for key, value in told.items() if value})
        torch.manual_seed(0)
        stages[stage](studio, plan)
        if RANKS > 1:
            dist.barrier()  # what this stage wrote, the next one reads
        if RANK == 0:
            save_curves(studio.state, args.out / "log")


if __name__ == "__main__":
    main(__doc__, STAGES, PLANS)
