"""DDIM in both directions: a table of noise levels and two affine maps. Deterministic (η = 0).

The noise level of a latent is its alpha_bar, the product of the schedule's alphas: z_t = √ᾱ x0 + √(1-ᾱ) ε.
The papers' α_t is this product. Levels are Python floats, so that no step waits for a device.

References: DDIM, arXiv 2010.02502 (Eq. 12 there); the paper, Eqs. 2-4 and 10.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .common.problem import Problem


@dataclass(frozen=True)
class ScheduleConfig:
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    steps_offset: int = 1
    alpha_to_one: bool = False      # below t = 0 the level is 1, instead of that at 0


class Step(NamedTuple):
    """One stride of the grid, from time `t` down to `t_prev`; a time below 0 stands for clean latents."""

    t: int
    t_prev: int


class Schedule:
    """The noise levels a model was trained on, and the grid of time steps that sampling visits."""

    def __init__(self, config: ScheduleConfig = ScheduleConfig()):
        self.config = config
        power = 1 if config.beta_schedule == "linear" else 2
        first, last = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
        betas = torch.linspace(first, last, config.train_steps, dtype=torch.float64) ** power
        self._alpha_bar = (1 - betas).cumprod(0).tolist()

    def alpha_bar(self, t: int) -> float:
        """The level at training step t; below 0 that of clean latents, for SD1.5 ᾱ[0] = 0.99915."""
        if t < 0 and self.config.alpha_to_one:
            return 1.0
        return self._alpha_bar[max(t, 0)]

    def steps(self, n: int) -> list[Step]:
        """n steps in sampling order; for n = 50: (981, 961), (961, 941), ..., (1, -19). Raises Problem."""
        most = self.config.train_steps - self.config.steps_offset
        if not 1 <= n <= most:
            raise Problem(f"steps is {n}, expected 1 to {most}; 50 is the paper's")
        gap = self.config.train_steps // n
        grid = [i * gap + self.config.steps_offset for i in reversed(range(n))]
        return [Step(t, t - gap) for t in grid]

    def step(self, z: Tensor, eps: Tensor, stride: Step) -> Tensor:
        """One stride of sampling: z_t and the noise predicted at t -> z at t_prev."""
        return step(z, eps, self.alpha_bar(stride.t), self.alpha_bar(stride.t_prev))

    def inverse_step(self, z: Tensor, eps: Tensor, stride: Step) -> Tensor:
        """The same stride walked up: z̄ at t_prev and a noise prediction -> z̄_t."""
        return inverse_step(z, eps, self.alpha_bar(stride.t_prev), self.alpha_bar(stride.t))


def draw_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0,1) in the shape of `like`, from a CPU generator in float64: one seed is one picture on every device."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def predict_x0(z: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """The clean latent that noise `eps` implies. Read literally, the paper's step with σ = 0 ends here; see `step`."""
    return (z - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """Eq. 2 in closed form: the latent at level alpha_bar on the straight way from x0 to eps."""
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps


def step(z: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
    """Eqs. 3 and 10, as DDIM means them: z_t and the noise predicted at t -> z at the previous, cleaner level."""
    return add_noise(predict_x0(z, eps, alpha_bar), eps, alpha_bar_prev)


def inverse_step(z: Tensor, eps: Tensor, alpha_bar_prev: float, alpha_bar: float) -> Tensor:
    """Eq. 4: z̄ at the cleaner level and a noise prediction -> z̄_t. Exactly undoes `step` for the same eps."""
    return step(z, eps, alpha_bar_prev, alpha_bar)


def adain(x: Tensor, ref: Tensor) -> Tensor:
    """RIVAL's noise alignment: x with ref's mean and deviation in each channel. (N,4,h,w), (1 or N,4,h,w)."""
    def moments(y):
        return y.mean((2, 3), keepdim=True), (y.var((2, 3), keepdim=True) + 1e-5).sqrt()
    (mean, std), (ref_mean, ref_std) = moments(x), moments(ref)
    return (x - mean) / std * ref_std + ref_mean
