"""The reference picture as the sampling loop needs it: its DDIM inversion, computed once, and its replay.

Inversion gives the chain z̄_0 ... z̄_T. The reference's keys and values at step t depend on (z̄_t, t) alone, so they
are computed by *replaying* the known chain, several steps as one batch, and serve every variation, seed and λ.
(Those of the inversion pass itself are other tensors: it evaluates z̄ of the level below with the label t.)

References: the paper, Eq. 4; RIVAL, arXiv 2305.18729. Shapes: T steps, (4,h,w) a latent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .attention import KV, Attend, attend as plain_attend, capture
from .common.images import fit, to_images, to_tensor
from .common.progress import Progress, silent
from .ddim import Step, inverse_step, step
from .networks.model import Model, Watch


@dataclass(frozen=True)
class Reference:
    """A picture and its inversion. `chain` is (T+1,4,h,w): clean latent first, z̄_T last."""

    image: Image.Image
    chain: Tensor
    prompt: str = ""

    @property
    def steps(self) -> int:
        return len(self.chain) - 1


class Seen(NamedTuple):
    """What one step of the replay saw: the reference's keys and values, and the noise predicted for it."""

    kv: KV
    eps: Tensor


def invert(model: Model, image: Image.Image, steps: int = 50, prompt: str = "", size: int | None = None,
           attend: Attend = plain_attend, progress: Progress = silent, fit_by: str = "crop") -> Reference:
    """DDIM inversion of a picture, without guidance. The picture is fitted to the model's size, as images.fit does.

    RIVAL's convention: the stride from t-20 up to t evaluates the UNet on z̄ at level t-20 with the label t.
    """
    grid = model.schedule.steps(steps)
    image = fit(image, model.check_size(model.size if size is None else size), fit_by)
    context = model.context([prompt])
    chain = [model.encode(to_tensor(image))]
    watch = Watch(model, "inverting")
    for t, t_prev in progress(grid[::-1], "inverting"):
        eps = model.noise(chain[-1], t, context, attend)
        z = inverse_step(chain[-1], eps, model.schedule.alpha_bar(t_prev), model.schedule.alpha_bar(t))
        chain.append(watch(z, t))
    watch.done()
    return Reference(image, torch.cat(chain), prompt)


def reconstruct(model: Model, ref: Reference, attend: Attend = plain_attend,
                progress: Progress = silent) -> Image.Image:
    """Plain DDIM from z̄_T back, without any control: the baseline x̃_0 of the paper's Fig. 1."""
    context, z = model.context([ref.prompt]), ref.chain[-1:]
    watch = Watch(model, "reconstructing")
    for t, t_prev in progress(model.schedule.steps(ref.steps), "reconstructing"):
        eps = model.noise(z, t, context, attend)
        z = watch(step(z, eps, model.schedule.alpha_bar(t), model.schedule.alpha_bar(t_prev)), t)
    watch.done()
    return to_images(model.decode(z))[0]


def replay(model: Model, ref: Reference, wanted: Callable[[int], bool] = lambda t: True, at_once: int = 5,
           kernel: Attend = plain_attend) -> Iterator[Seen | None]:
    """What the reference looks like at each step, in sampling order; None at steps that are not wanted.

    `at_once` steps go through the UNet as one batch with per-row time steps: 1 is a live reference row, `ref.steps`
    a full cache; the result is the same. `list(replay(...))` keeps everything for several calls of `sample`.
    """
    grid = model.schedule.steps(ref.steps)
    ahead = [i for i, (t, _) in enumerate(grid) if wanted(t)]
    context, seen = model.context([ref.prompt]), {}
    for i in range(len(grid)):
        if i in ahead and i not in seen:
            chunk = [j for j in ahead if j >= i][:at_once]
            seen = dict(zip(chunk, _see(model, ref, [(j, grid[j]) for j in chunk], context, kernel)))
        yield seen.pop(i, None)


def _see(model: Model, ref: Reference, chunk: list[tuple[int, Step]], context: Tensor,
         kernel: Attend) -> Iterator[Seen]:
    z = torch.stack([ref.chain[ref.steps - i] for i, _ in chunk])           # step i starts at level T - i
    t = torch.tensor([step.t for _, step in chunk], device=z.device)        # one time step per row
    store: KV = {}
    eps = model.noise(z, t, context.expand(len(z), -1, -1), capture(store, kernel))
    for row in range(len(z)):
        one = slice(row, row + 1)
        yield Seen({name: (k[one], v[one]) for name, (k, v) in store.items()}, eps[one])
