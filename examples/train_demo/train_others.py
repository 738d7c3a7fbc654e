"""Train the demo's counterparts of what the paper compares with and measures by, into the demo folder: the
image-variation UNet, the Shuffle ControlNet, the prior, and the metrics' CLIP pair, trunks and heads.

    python examples/train_demo/train_others.py OUT   # after train_demo.py OUT; the same flags, and it resumes, too

Each is small, in its published file layout, and starts from the demo's own networks where the published one started
from Stable Diffusion's. The metrics' networks share nothing with the models that they will judge.
"""

import csv
import json
import shutil
import sys
from pathlib import Path

import demo_world as world
import numpy as np
import torch
from demo_files import CLIP_TEXT, CLIP_VISION, UNET, config_json, load_network, save_network, save_tensors
from demo_fit import RANKS, SCENES, Plan, Studio, fit
from demo_metrics import train_heads, train_metric_clip, train_trunk
from PIL import Image
from torch import Tensor, nn
from train_demo import Diffusion, image_embeds, main

from isadca.common.files import save_png
from isadca.networks.clip import CLIPText
from isadca.networks.unet import UNet

sys.path.append(str(Path(__file__).resolve().parents[1] / "counterparts"))
from controlnet_shuffle import ControlNet, shuffle_content
from kandinsky_prior import Prior, PriorConfig, alpha_bar, text_condition

PLANS = {"variations": Plan(700, 32, 4e-4), "controlnet": Plan(1150, 32, 1e-3), "prior": Plan(1500, 64, 1e-3),
         "metric_clip": Plan(700, 64, 1e-3), "alex": Plan(2500, 48, 2e-3), "vgg": Plan(1500, 48, 2e-3),
         "inception": Plan(1000, 48, 2e-3), "lpips-alex": Plan(500, 32, 1e-2), "lpips-vgg": Plan(300, 32, 1e-2),
         "pairs": Plan(0, 0, 0)}
PRIOR = PriorConfig(embed_dim=CLIP_VISION.projection_dim, n_heads=3, layers=4, max_tokens=CLIP_TEXT.max_tokens)
HINT_CHANNELS = (16, 32, 64)


# ---- systems -----------------------------------------------------------------------------------------------------

def train_variations(studio: Studio, plan: Plan) -> None:
    """The demo's UNet goes on with the picture's CLIP embedding as its whole context, as SD image-variations did."""
    diffusion, kernel, embeds = Diffusion(studio), studio.attend(), image_embeds(studio)

    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch // RANKS)
        kept = torch.from_numpy(rng.random((len(index), 1)) >= 0.1).to(embeds.device)
        return diffusion.loss(net, index, (embeds[index] * kept)[:, None], kernel)

    folder = studio.folder / "image-variations"
    unet = studio.begin(folder / "unet", load_network(studio.folder / "unet", UNet)).requires_grad_(True)
    save_network(folder / "unet", fit("variations", unet, loss, studio, plan), UNET)
    for part in ("vae", "image_encoder"):
        shutil.copytree(studio.folder / part, folder / part, dirs_exist_ok=True)


def train_controlnet(studio: Studio, plan: Plan) -> None:
    """A copy of the UNet's way down learns to read the shuffled picture; every residual starts at zero.

    Only the hint tells the colour here: no caption does, and the noise levels are those that hide it. A colour is a
    small part of the error, but nearly all of the error's mean over the grid, so the loss has this mean as well. The
    hint encoder's last layer does not start at zero: before residuals that do, it would not begin to learn.
    """
    diffusion, kernel = Diffusion(studio), studio.attend()
    unet = load_network(studio.folder / "unet", UNet).to(studio.device)
    net = ControlNet(UNET, HINT_CHANNELS)
    net.load_state_dict(unet.state_dict(), strict=False)
    for layer in (net.controlnet_mid_block, *net.controlnet_down_blocks):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    net = studio.begin(studio.folder / "controlnet-shuffle", net)

    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch // RANKS)
        hint, context = shuffled(studio, index, rng), diffusion.text(studio.nouns(index, rng, 0.3))
        def controlled(z, t, context, attend):
            return unet(z, t, context, attend, net(z, t, context, hint, pooled=True, attend=attend))
        error, _ = diffusion.error(controlled, index, context, kernel, earliest=600)  # there all weights are 1
        return error.pow(2).mean() + error.mean((2, 3)).pow(2).mean() * error[0, 0].numel()

    save_controlnet(studio.folder / "controlnet-shuffle", fit("controlnet", net, loss, studio, plan))


def save_controlnet(folder: Path, net: ControlNet) -> None:
    config = config_json(UNET) | dict(_class_name="ControlNetModel", global_pool_conditions=True,
                                      conditioning_embedding_out_channels=HINT_CHANNELS)
    del config["up_block_types"], config["out_channels"], config["sample_size"], config["center_input_sample"]
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "diffusion_pytorch_model.safetensors", net.state_dict())
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def shuffled(studio: Studio, index: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The scenes' pictures with their content shuffled, (B,3,64,64) in [0,1]."""
    pictures = [np.asarray(shuffle_content(Image.fromarray(studio.pictures[i]), int(rng.integers(2**31)), cell=32))
                for i in index]
    return torch.from_numpy(np.stack(pictures)).to(studio.device).permute(0, 3, 1, 2).float() / 255


def train_prior(studio: Studio, plan: Plan) -> None:
    """From a caption to its picture's CLIP embedding, by Kandinsky's objective: predict the clean embedding."""
    text = load_network(studio.folder / "text_encoder_with_projection", CLIPText).to(studio.device)
    embeds = image_embeds(studio)
    mean, std = embeds.mean(0), embeds.std(0)
    levels = torch.tensor([alpha_bar(t) for t in range(1000)], device=embeds.device)

    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch // RANKS)
        with torch.no_grad():
            told = text_condition(text, studio.tokenizer, studio.texts(index, rng, 0.1))
        x0, t = (embeds[index] - mean) / std, torch.randint(0, 1000, (len(index),), device=embeds.device)
        level = levels[t][:, None]
        return (net(level.sqrt() * x0 + (1 - level).sqrt() * torch.randn_like(x0), t, told) - x0).square().mean()

    net = Prior(PRIOR)
    nn.init.normal_(net.positional_embedding, std=0.02), nn.init.normal_(net.prd_embedding, std=0.02)
    net.clip_mean.data[0], net.clip_std.data[0] = mean.cpu(), std.cpu()
    net.clip_mean.requires_grad_(False), net.clip_std.requires_grad_(False)
    folder = studio.folder / "prior"
    (folder / "prior").mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "prior" / "diffusion_pytorch_model.safetensors",
                 fit("prior", net, loss, studio, plan).state_dict())
    config = dict(_class_name="PriorTransformer", num_attention_heads=PRIOR.n_heads, attention_head_dim=PRIOR.head_dim,
                  num_layers=PRIOR.layers, embedding_dim=PRIOR.embed_dim, num_embeddings=PRIOR.max_tokens)
    (folder / "prior" / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copytree(studio.folder / "text_encoder_with_projection", folder / "text_encoder", dirs_exist_ok=True)
    shutil.copytree(studio.folder / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


# ---- pairs -------------------------------------------------------------------------------------------------------

def save_pairs(studio: Studio, plan: Plan) -> None:
    """Twenty pairs for `isadca evaluate`: ten held-out scenes, each with two prompts that name another noun."""
    folder, rng = studio.folder / "pairs", np.random.default_rng(11)
    folder.mkdir(exist_ok=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["reference", "prompt"])
        for i in range(10):
            scene = world.random_scene(rng, unseen=True)
            name = f"{i:02d}-{scene.noun}.png"
            save_png(Image.fromarray(world.draw(scene, studio.art)), folder / name)
            others = [noun for noun in world.NOUNS if noun != scene.noun]
            for noun in rng.choice(others, 2, replace=False):
                table.writerow([name, world.article(str(noun))])


STAGES = {"variations": train_variations, "controlnet": train_controlnet, "prior": train_prior,
          "metric_clip": train_metric_clip, **{kind: train_trunk(kind) for kind in ("alex", "vgg", "inception")},
          **{f"lpips-{kind}": train_heads(kind) for kind in ("alex", "vgg")}, "pairs": save_pairs}

if __name__ == "__main__":
    main(__doc__, STAGES, PLANS)
