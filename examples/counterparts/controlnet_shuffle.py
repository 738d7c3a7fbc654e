"""ControlNet 1.1 Shuffle, as the paper compares with it: text to image in the style of a picture.

    isadca evaluate weights/demo/pairs -o results --systems isadca,examples/counterparts/controlnet_shuffle.py:SYSTEM

A ControlNet is a copy of the UNet's way down that reads a hint picture and corrects the UNet's skips. Shuffle's hint is
the reference with its content shuffled, and its residuals are averaged over the grid, so that style comes through and
layout does not.

References: ControlNet, arXiv 2302.05543; lllyasviel/ControlNet-v1-1. Attribute names are diffusers' checkpoint keys.
Shapes: as in networks/unet.py; a hint is (B,3,H,W).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from isadca import Model, Problem, attend as plain_attend, decode
from isadca.attention import KV, Attend
from isadca.common.images import fit, to_tensor
from isadca.ddim import draw_noise
from isadca.evaluation.systems import Draw, System
from isadca.loading.checkpoints import load_into, read_header, take, without_values
from isadca.loading.layouts import Layout
from isadca.loading.load import pick_file
from isadca.loading.original import UNET_RULES
from isadca.loop import guide
from isadca.networks.sizes import UNetConfig
from isadca.networks.unet import Descent, Inputs


# ---- the network ------------------------------------------------------------------------------------------------

class HintEncoder(nn.Module):
    """Pixels in [0,1] to the UNet's first activation, halving the grid at every other convolution."""

    def __init__(self, channels: tuple[int, ...], c_out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for c, wider in zip(channels, channels[1:]):
            self.blocks += [nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, wider, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(channels[-1], c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Descent):
    """`hint_channels`: one more than the halvings between a pixel and a latent cell; SD1.5's are the default."""

    def __init__(self, config: UNetConfig = UNetConfig(), hint_channels: tuple[int, ...] = (16, 32, 96, 256)):
        super().__init__(config)
        self.controlnet_cond_embedding = HintEncoder(hint_channels, config.channels[0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in self.skip_channels)
        self.controlnet_mid_block = nn.Conv2d(config.channels[-1], config.channels[-1], 1)

    def forward(self, z: Tensor, t: Tensor | int, context: Tensor | KV, hint: Tensor, pooled: bool = False,
                attend: Attend = plain_attend) -> list[Tensor]:
        """What to add to the UNet's skips, and last to its middle; 13 tensors for SD1.5.

        `pooled` replaces each by its mean over the grid, (B,C,1,1), as the Shuffle model was trained.
        """
        x = self.conv_in(z) + self.controlnet_cond_embedding(hint)
        x, skips = self.descend(x, Inputs(self.embed_time(z, t), context, attend))
        residuals = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips)]
        residuals.append(self.controlnet_mid_block(x))
        return [r.mean((2, 3), keepdim=True) for r in residuals] if pooled else residuals


# ---- its published files ----------------------------------------------------------------------------------------

LDM_RULES = [
    (r"^input_hint_block\.0\.", "controlnet_cond_embedding.conv_in."),
    (r"^input_hint_block\.14\.", "controlnet_cond_embedding.conv_out."),
    (r"^input_hint_block\.(\d+)\.", lambda m: f"controlnet_cond_embedding.blocks.{int(m[1]) // 2 - 1}."),
    (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
    (r"^middle_block_out\.0\.", "controlnet_mid_block."),
    *UNET_RULES]
LAYOUTS = [  # LDM's files are published with and without a prefix
    Layout("controlnet", "LDM", "control_model.input_hint_block.0.weight", "control_model.", LDM_RULES),
    Layout("controlnet", "LDM", "input_hint_block.0.weight", "", LDM_RULES),
    Layout("controlnet", "diffusers", "controlnet_cond_embedding.conv_in.weight")]


def load_controlnet(path: str | Path, config: UNetConfig = UNetConfig(), dtype: torch.dtype = torch.float32,
                    device: torch.device | str = "cpu") -> ControlNet:
    """A ControlNet file or folder, in diffusers' layout or LDM's. `config` is that of the UNet it belongs to, whose
    way down it copies. Raises Problem for other files and other UNets."""
    path = Path(path)
    path = pick_file(path, dtype) if path.is_dir() else path
    header = read_header(path)
    layout = next((layout for layout in LAYOUTS if layout.mark in header.tensors), None)
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


# ---- sampling ---------------------------------------------------------------------------------------------------

def restyle(model: Model, controlnet: ControlNet, image: Image.Image, prompt: str, steps: int = 50,
            guidance: float = 7.0, seed: int = 0) -> Image.Image:
    """Text to image in the style of a picture, by DDIM: ControlNet Shuffle as its authors run it, with the hint
    shuffled, the residuals pooled, and nothing on the unconditional half."""
    device, side, latent = model.device, model.size, model.unet.config.sample_size
    hint = (to_tensor(shuffle_content(fit(image, (side, side)), seed, cell=side // 2)) + 1) / 2
    hint, context = hint.to(device, model.dtype), model.context(["", prompt])
    kv, own_kv = model.unet.keys_values(context), controlnet.keys_values(context[1:])
    z = torch.empty(1, 4, latent, latent, device=device, dtype=model.latent_dtype)
    z = draw_noise(z, torch.Generator().manual_seed(seed))
    for stride in model.schedule.steps(steps):
        x, t = z.to(model.dtype), stride.t
        residuals = on_text_half(controlnet(x, t, own_kv, hint, pooled=True))
        eps = model.unet(x.expand(2, -1, -1, -1), t, kv, residuals=residuals).to(z.dtype)
        z = model.schedule.step(z, guide(eps.chunk(2), guidance), stride)
    return decode(model, z)[0]


def on_text_half(residuals: list[Tensor]) -> list[Tensor]:
    """Residuals for the guidance halves [unconditional, text]: none for the first, as the Shuffle model wants it."""
    return [torch.cat([torch.zeros_like(r), r]) for r in residuals]


# ---- the shuffled hint ------------------------------------------------------------------------------------------

def shuffle_content(image: Image.Image, seed: int, cell: int = 256) -> Image.Image:
    """A picture with its parts moved about along smooth random fields: the Shuffle model's preprocessor, which gives
    the same picture for a seed. Each pixel reads from the place that the fields give; they span the whole picture."""
    rng = np.random.RandomState(seed % 2**32)
    pixels = np.asarray(image.convert("RGB"), np.float64)
    width, height = image.size
    x, y = (smooth_noise(rng, width, height, cell) * (side - 1) for side in (width, height))
    return Image.fromarray(np.floor(read_between(pixels, x, y) + 0.5).astype(np.uint8))


def read_between(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear, at 32nds of a pixel, as OpenCV's remap reads. (H,W,C) at places (h,w) -> (h,w,C)."""
    x, y = (np.round(place.astype(np.float32) * 32) / 32 for place in (x, y))
    left, top = x.astype(int), y.astype(int)
    right, bottom = np.minimum(left + 1, pixels.shape[1] - 1), np.minimum(top + 1, pixels.shape[0] - 1)
    a, b = (x - left)[..., None], (y - top)[..., None]
    above = (1 - a) * pixels[top, left] + a * pixels[top, right]
    below = (1 - a) * pixels[bottom, left] + a * pixels[bottom, right]
    return (1 - b) * above + b * below


def smooth_noise(rng: np.random.RandomState, width: int, height: int, cell: int) -> np.ndarray:
    """(height, width) in [0,1], both ends reached: uniform noise on a coarse grid, enlarged bicubically."""
    coarse = rng.uniform(size=(height // cell + 2, width // cell + 2))
    rows, columns = (enlarging(n, side + 2 * cell) for n, side in zip(coarse.shape, (height, width)))
    field = (rows @ coarse @ columns.T)[cell:cell + height, cell:cell + width]
    field = field - field.min()
    return field / field.max()


def enlarging(n: int, wanted: int) -> np.ndarray:
    """The matrix (wanted, n) of bicubic enlarging as OpenCV has it: A = -0.75, the last value repeated at the ends."""
    place = ((np.arange(wanted) + 0.5) * (n / wanted) - 0.5).astype(np.float32)
    first = np.floor(place).astype(int)
    matrix = np.zeros((wanted, n))
    for near in (first - 1, first, first + 1, first + 2):
        d = abs(place - near)
        weight = np.where(d <= 1, (1.25 * d - 2.25) * d**2 + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3)
        np.add.at(matrix, (np.arange(wanted), near.clip(0, n - 1)), weight)
    return matrix


# ---- the system -------------------------------------------------------------------------------------------------

def prepare(folder: Path, model: Model, weights: Path, steps: int) -> Draw:
    controlnet = load_controlnet(folder, model.unet.config, model.dtype, model.device)
    return lambda image, prompt, seed: restyle(model, controlnet, image, prompt, steps, seed=seed)


SYSTEM = System("controlnet-shuffle", "ControlNet Shuffle", prepare, needs="controlnet-shuffle",
                paper=(0.5410, 0.5458, 0.0307, 0.8029))
