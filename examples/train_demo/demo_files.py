"""The demo checkpoint as files: the networks' sizes, and how they are written in Stable Diffusion 1.5's layout."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

from demo_world import learn_bpe, vocabulary
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isadca.common.files import atomic_write
from isadca.loading.config_json import read_config
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

MAX_TOKENS = 32
UNET = UNetConfig(channels=(64, 128, 168), attention=(True, True, False), layers_per_block=1, n_heads=4,
                  context_dim=128, norm_groups=8, sample_size=16)
VAE_SIZES = VAEConfig(channels=(24, 48, 64), layers_per_block=1, norm_groups=8)
CLIP_TEXT = CLIPTextConfig(vocab_size=len(learn_bpe(vocabulary())[0]), width=128, layers=4, n_heads=4, mlp_width=512,
                           max_tokens=MAX_TOKENS, projection_dim=128)
CLIP_VISION = CLIPVisionConfig(width=128, layers=4, n_heads=4, mlp_width=512, image_size=64, patch_size=8,
                               projection_dim=128)

CONFIGS = {UNet: UNetConfig, VAE: VAEConfig, CLIPText: CLIPTextConfig, CLIPVision: CLIPVisionConfig}


def config_json(config) -> dict:
    """The config.json that diffusers and transformers read for the same network."""
    if isinstance(config, UNetConfig):
        down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention]
        up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in config.attention[::-1]]
        return dict(_class_name="UNet2DConditionModel", in_channels=4, out_channels=4, down_block_types=down,
                    up_block_types=up, block_out_channels=config.channels, layers_per_block=config.layers_per_block,
                    attention_head_dim=config.n_heads, cross_attention_dim=config.context_dim,
                    norm_num_groups=config.norm_groups, sample_size=config.sample_size, act_fn="silu",
                    flip_sin_to_cos=True, freq_shift=0, norm_eps=1e-5, center_input_sample=False,
                    downsample_padding=1, mid_block_scale_factor=1)
    if isinstance(config, VAEConfig):
        n = len(config.channels)
        return dict(_class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=4,
                    down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
                    block_out_channels=config.channels, layers_per_block=config.layers_per_block,
                    norm_num_groups=config.norm_groups, act_fn="silu", sample_size=64,
                    scaling_factor=config.scaling_factor)
    common = dict(hidden_size=config.width, num_hidden_layers=config.layers, num_attention_heads=config.n_heads,
                  intermediate_size=config.mlp_width, hidden_act=config.act, layer_norm_eps=config.eps,
                  projection_dim=config.projection_dim or 128, dtype="float32")  # for computing; the files are fp16
    if isinstance(config, CLIPTextConfig):
        kind = "CLIPTextModelWithProjection" if config.projection_dim else "CLIPTextModel"
        return common | dict(architectures=[kind], model_type="clip_text_model", vocab_size=config.vocab_size,
                             max_position_embeddings=config.max_tokens, bos_token_id=config.vocab_size - 2,
                             eos_token_id=config.vocab_size - 1, pad_token_id=config.vocab_size - 1)
    return common | dict(architectures=["CLIPVisionModelWithProjection"], model_type="clip_vision_model",
                         image_size=config.image_size, patch_size=config.patch_size, num_channels=3)


def save_network(folder: Path, net: nn.Module, config=None) -> None:
    """fp16 weights and config.json, under the names that diffusers and transformers look for."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "diffusion_pytorch_model" if isinstance(net, (UNet, VAE)) else "model"
    save_tensors(folder / f"{name}.safetensors", net.state_dict())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config_json(config), indent=1) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_write(path) as temporary:
        save_file({key: x.detach().half().cpu().contiguous() for key, x in tensors.items()}, temporary)


def load_network(folder: Path, cls) -> nn.Module:
    """A network that an earlier stage saved, in float32, frozen."""
    tensors, config = load_file(next(folder.glob("*.safetensors"))), read_config(CONFIGS[cls], folder / "config.json")
    if "text_projection.weight" in tensors:  # no config tells whether there is one
        config = replace(config, projection_dim=len(tensors["text_projection.weight"]))
    net = cls(config)
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def save_pipeline(folder: Path) -> None:
    """The noise schedule, which is SD1.5's own, and the list of parts."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    schedule = dict(_class_name="DDIMScheduler", num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                    beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False,
                    prediction_type="epsilon", timestep_spacing="leading")
    parts = dict(unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
                 text_encoder=["transformers", "CLIPTextModel"], tokenizer=["transformers", "CLIPTokenizer"],
                 scheduler=["diffusers", "DDIMScheduler"], safety_checker=[None, None],
                 feature_extractor=[None, None], image_encoder=[None, None])
    index = dict(_class_name="StableDiffusionPipeline", **parts, requires_safety_checker=False)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=1) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def save_curves(state: Path, folder: Path) -> None:
    """Copy the stages' logs (step, mean loss of 100 steps) into `folder`, and draw them, five in a row."""
    logs = sorted(log for log in state.glob("*.csv") if log.stat().st_size)
    if not logs:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(logs) // 5)
    sheet = Image.new("RGB", (300 * min(len(logs), 5), 240 * rows), "white")
    for i, log in enumerate(logs):
        shutil.copyfile(log, folder / log.name)
        points = [tuple(map(float, line.split(","))) for line in log.read_text().splitlines()]
        sheet.paste(curve(log.stem, points), (300 * (i % 5), 240 * (i // 5)))
    sheet.save(folder / "curves.png")


def curve(title: str, points: list[tuple[float, float]]) -> Image.Image:
    """Loss against steps, on a logarithmic axis, with its ends written out."""
    panel, font = Image.new("RGB", (300, 240), "white"), ImageFont.load_default(size=13)
    draw = ImageDraw.Draw(panel)
    low, high = (math.log(pick(y for _, y in points)) for pick in (min, max))
    place = lambda x, y: (52 + 236 * x / points[-1][0], 204 - 170 * (math.log(y) - low) / (high - low or 1))
    draw.rectangle((52, 30, 290, 208), outline="lightgray")
    draw.line([place(*point) for point in points], "steelblue", 2)
    draw.text((52, 8), f"{title}: loss, {points[-1][0]:.0f} steps", "black", font)
    draw.text((4, 28), f"{math.exp(high):.3g}", "dimgray", font)
    draw.text((4, 192), f"{math.exp(low):.3g}", "dimgray", font)
    return panel
