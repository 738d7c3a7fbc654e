"""The training loop of train_demo.py: scenes and their captions, and one `fit` for every network.

A stage can be stopped at any time and resumed; on several processes (torchrun) each has a share of the batch.
"""

import copy
import os
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import demo_world as world
import numpy as np
import torch
import torch.distributed as dist
from demo_files import MAX_TOKENS
from safetensors.torch import load_file
from torch import Tensor, nn

from isadca.attention import Attend, attend
from isadca.networks.tokenizer import Tokenizer

SCENES = 24000
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
Loss = Callable[[nn.Module, np.random.Generator], Tensor]


class Plan(NamedTuple):
    """How a stage is trained. The rate rises for `warmup` steps, stays, and falls to zero over the last fifth."""

    steps: int
    batch: int  # over all processes
    lr: float
    warmup: int = 100

    def rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup, (self.steps - step) / (0.2 * self.steps))


class Studio:
    """What every stage works with: device and precision, the scenes and their pictures, the folder."""

    def __init__(self, folder: Path, art: Path, bf16: bool, go_on: bool = False):
        self.folder, self.state, self.go_on = folder, folder / ".train", go_on
        self.state.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = bf16
        self.tokenizer = Tokenizer.from_folder(folder / "tokenizer", MAX_TOKENS)
        rng = np.random.default_rng(1)
        self.art = world.fetch_art(art)
        self.scenes = [world.random_scene(rng) for _ in range(SCENES)]
        self.pictures = np.stack([world.draw(scene, self.art) for scene in self.scenes])

    def begin(self, path: Path, net: nn.Module) -> nn.Module:
        """`net` as it is or, with --go-on, with the finished weights that the folder has for it."""
        if self.go_on:
            net.load_state_dict(load_file(path if path.is_file() else next(path.glob("*.safetensors"))))
        return net

    def autocast(self, enabled: bool = True):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled) if self.bf16 else nullcontext()

    def pixels(self, index: np.ndarray) -> Tensor:
        """Scenes -> their pictures, (B,3,64,64) in [-1,1]."""
        x = torch.from_numpy(self.pictures[index]).to(self.device)
        return x.permute(0, 3, 1, 2).float() / 127.5 - 1

    def attend(self) -> Attend:
        """The fused kernel in float32: its bfloat16 backward pass is several times slower on CPUs."""
        def attend_float32(q, k, v, site):
            with self.autocast(enabled=False):
                return attend(q.float(), k.float(), v.float(), site).to(q.dtype)
        return attend_float32

    def texts(self, index: np.ndarray, rng: np.random.Generator, dropped: float = 0) -> list[str]:
        """A caption for each scene, a share of them empty."""
        return [world.caption(self.scenes[i], rng) if rng.random() >= dropped else "" for i in index]

    def captions(self, index: np.ndarray, rng: np.random.Generator, dropped: float = 0) -> Tensor:
        """The same as token ids."""
        return self.tokenizer(self.texts(index, rng, dropped)).to(self.device)

    def nouns(self, index: np.ndarray, rng: np.random.Generator, dropped: float = 0) -> Tensor:
        """Captions that say the noun and no more, as token ids."""
        return self.tokenizer([world.article(self.scenes[i].noun) if rng.random() >= dropped else "" for i in index]
                              ).to(self.device)


def fit(name: str, net: nn.Module, loss: Loss, studio: Studio, plan: Plan) -> nn.Module:
    """Train `net` by the plan, from where it was stopped, and return its exponential moving average.

    Every step has its own random numbers, so that a resumed run is the run that was not stopped.
    """
    net = net.to(studio.device).train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema, first, path = copy.deepcopy(net), 0, studio.state / f"{name}.pt"
    if path.exists():
        saved = torch.load(path, map_location=studio.device, weights_only=True)
        net.load_state_dict(saved["net"]), ema.load_state_dict(saved["ema"]), optimizer.load_state_dict(saved["opt"])
        first = saved["step"]
    log, began = Log(studio.state / f"{name}.csv", first), time.monotonic()
    for step in range(first, plan.steps):
        rng = np.random.default_rng((zlib.crc32(name.encode()), step, RANK))
        torch.manual_seed(int(rng.integers(2**31)))
        optimizer.param_groups[0]["lr"] = plan.rate(step)
        value = loss(net, rng)
        optimizer.zero_grad()
        value.backward()
        average_over_ranks([p.grad for p in parameters])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        follow(ema, net, min(0.999, (step + 1) / (step + 10)))
        log.add(step + 1, value.item())
        if RANK == 0 and ((step + 1) % 500 == 0 or step + 1 == plan.steps):
            state = dict(net=net.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict(), step=step + 1)
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(f"{name}: step {step + 1} of {plan.steps}, loss {log.mean:.4f}, "
                  f"{pace * (plan.steps - step - 1) / 60:.0f} minutes to go", flush=True)
    return ema.eval().requires_grad_(False)


def average_over_ranks(gradients: list[Tensor]) -> None:
    if RANKS == 1:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / RANKS).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def follow(ema: nn.Module, net: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


class Log:
    """step, mean loss of the last 100 steps: a CSV that the loss curves are drawn from."""

    def __init__(self, path: Path, first: int):
        self.path, self.values, self.mean = path, [], float("nan")
        if RANK == 0 and path.exists():  # a run that was stopped may have logged more steps than it saved
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if int(line.split(",")[0]) <= first))

    def add(self, step: int, value: float) -> None:
        self.values.append(value)
        if step % 100 == 0:
            self.mean, self.values = sum(self.values) / len(self.values), []
            if RANK == 0:
                with self.path.open("a") as file:
                    file.write(f"{step},{self.mean:.6f}\n")
