"""The demo's counterparts of what the metrics read: a CLIP pair, AlexNet, VGG and Inception trunks, LPIPS's heads.

All at small widths, in the published key layouts; stages of train_others.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_clip import CLIP, clip_pixels
from demo_files import CLIP_TEXT, CLIP_VISION, config_json, save_tensors
from demo_fit import RANKS, SCENES, Plan, Studio, fit
from demo_judge import HEADS, blemish, judge_loss
from safetensors.torch import load_file
from torch import Tensor, nn

from isadca.evaluation.metrics import CAPTION, INCEPTION, POOL, POOLING, SCALE, SHIFT, TRUNKS, Conv, lpips, taps

WIDTHS = {"alex": (24, 48, 64, 64, 64), "vgg": (12, 12, 24, 24, 32, 32, 32, 48, 48, 48, 48, 48, 48),
          "inception": (16, 16, 32, 40, 64)}
SIDES = {"alex": (11, 5, 3, 3, 3), "vgg": (3,) * 13, "inception": (3, 3, 3, 1, 3)}  # of the kernels, torchvision's
DISTORTIONS = {  # a picture and a strength in [0,1]
    "noise": lambda x, s: x + 0.6 * s * torch.randn_like(x),
    "blur": lambda x, s: F.interpolate(F.interpolate(x, size=int(64 - 52 * s), mode="area"), size=64, mode="bilinear"),
    "shift": lambda x, s: torch.roll(x, int(1 + 10 * s), dims=3),
    "tint": lambda x, s: x + s * torch.randn(len(x), 3, 1, 1, device=x.device).sign() * 0.5,
    "another picture": lambda x, s: torch.lerp(x, x.flip(0), 0.8 * s)}
UNSEEN = {  # kinds that no head is trained on: what it learned has to hold for them
    "fading": lambda x, s: (1 - 0.9 * s) * x,
    "lines": lambda x, s: x + 0.6 * s * torch.randn(len(x), 1, 64, 1, device=x.device),
    "mosaic": lambda x, s: F.interpolate(F.interpolate(x, size=int(64 - 52 * s), mode="area"), size=64),
    "lost pixels": lambda x, s: torch.where(torch.rand(len(x), 1, 64, 64, device=x.device) < 0.5 * s, -1.0, x)}


def train_metric_clip(studio: Studio, plan: Plan) -> None:
    """A CLIP pair of its own, in the layout of OpenAI's; half of its captions carry CLIPScore's prefix."""
    def loss(net, rng):
        index = rng.integers(SCENES, size=plan.batch)
        texts = [CAPTION.format(text) if rng.random() < 0.5 else text for text in studio.texts(index, rng)]
        return net.loss(blemish(clip_pixels(studio, index), rng), studio.tokenizer(texts).to(studio.device))

    torch.manual_seed(1)
    ema = fit("metric_clip", CLIP(), loss, studio, plan)
    both = nn.ModuleDict(dict(**ema.text._modules, **ema.vision._modules))  # they have no name in common
    folder = metrics_folder(studio) / "clip"
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", both.state_dict() | {"logit_scale": ema.log_scale})
    config = dict(architectures=["CLIPModel"], model_type="clip", projection_dim=CLIP_TEXT.projection_dim,
                  text_config=config_json(CLIP_TEXT), vision_config=config_json(CLIP_VISION))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copytree(studio.folder / "tokenizer", folder, dirs_exist_ok=True)


def metrics_folder(studio: Studio) -> Path:
    folder = studio.folder / "metrics"
    folder.mkdir(exist_ok=True)
    return folder


class Trunk(nn.Module):
    """AlexNet's or VGG's convolutions at small widths, under torchvision's names, as a classifier of scenes.

    Thirteen plain layers hardly begin to learn, so each is trained with a batch normalisation after it; `fold` merges
    these into the weights: the same function, in the published layout.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind, widths = kind, WIDTHS[kind]
        numbers = [str(layer.number) for layer in TRUNKS[kind] if isinstance(layer, Conv)]
        self.features = nn.ModuleDict({n: nn.Conv2d(a, b, side) for n, a, b, side
                                       in zip(numbers, (3, *widths), widths, SIDES[kind])})
        self.norms = nn.ModuleDict({n: nn.BatchNorm2d(b, momentum=None) for n, b in zip(numbers, widths)})
        self.heads = new_heads(widths[-1])
        for conv in self.features.values():
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = scaled(x)
        for layer in TRUNKS[self.kind]:
            if layer == POOL:
                x = F.max_pool2d(x, POOLING[self.kind], stride=2)
            elif isinstance(layer, Conv):
                conv, n = self.features[str(layer.number)], str(layer.number)
                x = F.relu(self.norms[n](F.conv2d(x, conv.weight, conv.bias, layer.stride, layer.padding)))
        return answers(self.heads, x)

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        """The trunk alone, in torchvision's layout."""
        tensors = {}
        for n, conv in self.features.items():
            norm = self.norms[n]
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            tensors[f"features.{n}.weight"] = conv.weight * gain.view(-1, 1, 1, 1)
            tensors[f"features.{n}.bias"] = (conv.bias - norm.running_mean) * gain + norm.bias
        return tensors


class Inception(nn.Module):
    """Inception-v3's first layers at small widths, also as a classifier of scenes."""

    def __init__(self):
        super().__init__()
        widths, names = WIDTHS["inception"], [layer[0] for layer in INCEPTION if layer != POOL]
        for name, a, b, side in zip(names, (3, *widths), widths, SIDES["inception"]):
            norm = nn.BatchNorm2d(b, eps=0.001, momentum=None)  # averages over all that it has seen
            self.add_module(name, nn.ModuleDict({"conv": nn.Conv2d(a, b, side, bias=False), "bn": norm}))
        self.heads = new_heads(widths[-1])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in INCEPTION:
            if layer == POOL:
                x = F.max_pool2d(x, 3, stride=2)
                continue
            block, (_, stride, padding) = getattr(self, layer[0]), layer
            x = F.relu(block["bn"](F.conv2d(x, block["conv"].weight, None, stride, padding)))
        return answers(self.heads, x)


def scaled(x: Tensor) -> Tensor:
    shift, scale = (torch.tensor(c, device=x.device).view(1, 3, 1, 1) for c in (SHIFT, SCALE))
    return (x - shift) / scale


def new_heads(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(2 * width, len(words)) for name, words in HEADS.items()})


def answers(heads: nn.ModuleDict, x: Tensor) -> dict[str, Tensor]:
    pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
    return {name: head(pooled) for name, head in heads.items()}


def train_trunk(kind: str):
    def train(studio: Studio, plan: Plan) -> None:
        loss = judge_loss(studio.scenes, studio.pixels, plan.batch // RANKS)
        ema = fit(kind, Inception() if kind == "inception" else Trunk(kind), loss, studio, plan)
        count_again(ema, studio)
        heads = {f"heads.{key}": x for key, x in ema.heads.state_dict().items()}
        del ema.heads
        trunk = ema.state_dict() if kind == "inception" else ema.fold()
        save_tensors(metrics_folder(studio) / f"{kind}.safetensors", trunk)
        save_tensors(metrics_folder(studio) / f"{kind}-heads.safetensors", heads)  # for measure_demo.py, not metrics
    return train


@torch.no_grad()
def count_again(net: nn.Module, studio: Studio) -> None:
    """Batch statistics counted anew, since averaged weights need their own."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
    net.train()
    for i in np.array_split(np.arange(4000), 20):
        net(studio.pixels(i))
    net.eval()


class Heads(nn.Module):
    """LPIPS's weight of every channel of every tap, kept at or above zero."""

    def __init__(self, kind: str, trunk: dict[str, Tensor]):
        super().__init__()
        self.kind, self.trunk = kind, trunk
        device = next(iter(trunk.values())).device
        channels = [f.shape[1] for f in taps(torch.zeros(1, 3, 64, 64, device=device), kind, trunk)]
        self.raw = nn.ParameterList(torch.full((1, c, 1, 1), c**-0.5) for c in channels)

    def weights(self) -> dict[str, Tensor]:
        return {f"lin{level}.model.1.weight": raw.abs() for level, raw in enumerate(self.raw)}

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return lpips(a, b, self.kind, self.trunk, self.weights())


def train_heads(kind: str):
    """The published heads learned which of two distortions people find nearer. Here the order is known: of two
    distortions of one kind, the stronger is farther."""
    def train(studio: Studio, plan: Plan) -> None:
        trunk = {key: x.to(studio.device, torch.float32)
                 for key, x in load_file(metrics_folder(studio) / f"{kind}.safetensors").items()}

        def loss(net, rng):
            x = studio.pixels(rng.integers(SCENES, size=plan.batch // RANKS))
            weak, strong = sorted(rng.random(2))
            how = list(DISTORTIONS.values())[rng.integers(len(DISTORTIONS))]
            near, far = net(x, how(x, float(weak))), net(x, how(x, float(strong)))
            return F.softplus(8 * (near - far) / (near + far + 1e-6)).mean()

        heads = fit(f"lpips-{kind}", Heads(kind, trunk), loss, studio, plan)
        save_tensors(metrics_folder(studio) / f"lpips-{kind}.safetensors", heads.weights())
    return train
