"""The reference picture as the sampling loop needs it: its DDIM inversion, computed once, and its replay.

Inversion gives the chain z̄_0 ... z̄_T. The reference's keys and values at step t depend on (z̄_t, t) alone, so
they are computed by *replaying* the known chain, several steps as one batch, and serve every variation, seed and λ.
(Those of the inversion pass are other tensors: it evaluates z̄ of the level below with the label t.)

References: the paper, Eq. 4; RIVAL, arXiv 2305.18729; fixed-point inversion, ReNoise, arXiv 2403.14602.
Shapes: T steps, (4,h,w) a latent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .attention import KV, Attend, attend, capture, joined, rows_of
from .common.images import fit, load_image, to_images, to_tensor
from .common.problem import Problem, expect, expect_all
from .common.progress import Progress, shown, silent
from .ddim import draw_noise
from .methods import Method
from .networks.model import Model, Watch


@dataclass(frozen=True, repr=False)
class Reference:
    """A picture and its inversion. `chain` is (T+1,4,h,w): clean latent first, z̄_T last."""

    image: Image.Image                   # as the VAE saw it
    chain: Tensor
    prompt: str = ""
    original: Image.Image | None = None  # before it was fitted: what the image prompt's encoder sees

    def __repr__(self) -> str:
        return f"<isadca.Reference: {self.image.width}×{self.image.height}, {self.steps} steps, {self.prompt!r}>"

    @property
    def steps(self) -> int:
        return len(self.chain) - 1

    def every(self, k: int) -> "Reference":
        """The same inversion for k times fewer steps of sampling. Raises Problem where k does not divide them."""
        if self.steps % k:
            raise Problem(f"the reference has {self.steps} steps, which {k} does not divide; invert with other steps")
        kept = [0, *range(1, self.steps + 1, k)]  # the clean latent, and the levels that the longer strides visit
        return replace(self, chain=self.chain[kept])


class ReferenceStep(NamedTuple):
    """One step of the replay: the reference's keys and values, and the noise predicted for it."""

    kv: KV               # (1,H,M,d), or (2,H,M,d) with a row for each guidance half
    eps: Tensor | None   # (1,4,h,w)
    qk: KV = {}          # queries and keys of every layer, cross-attention too, where a method has `ref_maps`


def invert(model: Model, image: Image.Image | str | Path, steps: int = 50, prompt: str = "",
           size: int | tuple[int, int] | None = None, kernel: Attend = attend, progress: Progress | bool = silent,
           fit_by: str = "crop", fixed_point: int = 0) -> Reference:
    """DDIM inversion, without guidance, of a picture that images.fit brings to `size`: a side, or (width, height).

    RIVAL's convention: the stride from t_prev up to t evaluates the UNet on z̄ at t_prev with the label t.
    Each of `fixed_point` iterations is one more UNet call that moves this evaluation towards z̄_t itself; the way
    back then retraces the way up more closely.
    """
    expect("model", model, Model, "what isadca.load gives")
    expect("image", image, (Image.Image, str, Path), "a picture or its path")
    expect("steps", steps, int, "a whole number; 50 is the paper's")
    grid = model.schedule.steps(steps)
    original = load_image(image) if isinstance(image, (str, Path)) else image
    fitted = fit(original, model.check_size(model.size if size is None else size), fit_by)
    context = model.unet.keys_values(model.context([prompt]))
    chain = [model.encode(to_tensor(fitted))]
    watch = Watch(model, "inverting")
    for stride in shown(progress)(grid[::-1], "inverting"):
        z = chain[-1]
        for _ in range(1 + fixed_point):
            z = model.schedule.inverse_step(chain[-1], model.noise(z, stride.t, context, kernel), stride)
        chain.append(watch(z, stride.t))
    watch.done()
    return Reference(fitted, torch.cat(chain), prompt, original)


def reconstruct(model: Model, ref: Reference, progress: Progress | bool = silent) -> Image.Image:
    """Plain DDIM from z̄_T back, without any control: the baseline x̃_0 of the paper's Fig. 1."""
    context, z = model.unet.keys_values(model.context([ref.prompt])), ref.chain[-1:]
    watch = Watch(model, "reconstructing")
    for stride in shown(progress)(model.schedule.steps(ref.steps), "reconstructing"):
        eps = model.noise(z, stride.t, context)
        z = watch(model.schedule.step(z, eps, stride), stride.t)
    watch.done()
    return to_images(model.decode(z))[0]


# ---- the replay ------------------------------------------------------------------------------------------------

def replay(model: Model, ref: Reference, wanted: Callable[[int], bool] = lambda t: True, at_once: int = 5,
           kernel: Attend = attend, rows: int = 1, maps: bool = False) -> Iterator[ReferenceStep | None]:
    """What the reference looks like at each step, in sampling order; None at steps that are not wanted.

    `at_once` steps go through the UNet as one batch; their number does not change the result. `list(replay(...))`
    keeps everything for several calls of `sample`. `rows` is 1, or 2 for a reference of each guidance half: the
    first is prompted "", the second as it was inverted. `maps` keeps queries, too.
    """
    grid = model.schedule.steps(ref.steps)
    ahead = [i for i, stride in enumerate(grid) if wanted(stride.t)]
    context = model.unet.keys_values(model.context(["", ref.prompt][-rows:])) if ahead else {}
    ready: dict[int, ReferenceStep] = {}
    for i in range(len(grid)):
        if i in ahead and i not in ready:
            chunk = [j for j in ahead if j >= i][:max(1, at_once)]
            ready = dict(zip(chunk, reference_steps(model, ref, chunk, rows, context, kernel, maps)))
        yield ready.pop(i, None)


def reference_steps(model: Model, ref: Reference, numbers: list[int], rows: int, context: KV, kernel: Attend,
                    maps: bool) -> Iterator[ReferenceStep]:
    """The steps of these numbers, in one pass of the UNet; `context` has `rows` rows."""
    grid = model.schedule.steps(ref.steps)
    z = torch.stack([ref.chain[ref.steps - i] for i in numbers])           # step i starts at level T - i
    t = torch.tensor([grid[i].t for i in numbers], device=z.device)        # each row has its own time step
    kv: KV = {}
    qk: KV = {}
    attend = capture(kv, kernel, qk if maps else None)
    eps = model.noise(z.repeat(rows, 1, 1, 1), t.repeat(rows), context, attend)
    for i in range(len(numbers)):
        own = slice(i, None, len(numbers))
        yield ReferenceStep(rows_of(kv, own), eps[own][-1:], rows_of(qk, own))


def replay_all(model: Model, refs: Sequence[Reference], methods: Sequence[Method], at_once: int, kernel: Attend,
               replayed: Iterable[ReferenceStep | None] | None = None) -> Iterator[ReferenceStep | None]:
    """What `methods` want of each step; of several references, the tokens of all and the first one's noise.

    `replayed` is a kept replay of the one reference. Raises Problem where that has another number of steps, or lacks
    what the methods read.
    """
    train_steps, steps = model.schedule.config.train_steps, refs[0].steps
    if other := next((ref for ref in refs if ref.chain.shape != refs[0].chain.shape), None):
        raise Problem(f"a second reference is {other!r}, the first {refs[0]!r}; invert both with equal steps and size")
    wanted = lambda t: any(method.wants_reference(t, train_steps) for method in methods)
    rows, maps = max(method.ref_rows for method in methods), any(method.ref_maps for method in methods)
    kept = [iter(replayed)] if replayed is not None else \
        [replay(model, ref, wanted, at_once, kernel, rows, maps) for ref in refs]
    n = len(replayed) if isinstance(replayed, Sequence) else 0
    if n in (0, steps):
        for n, (step, *others) in enumerate(zip(*kept), 1):
            if n == steps and next(kept[0], None):  # one too many
                n += 1
                break
            if wanted(model.schedule.steps(steps)[n - 1].t):
                check_replayed(step, rows, maps)
            if others and step:
                step = step._replace(kv=joined([step.kv, *(other.kv for other in others)], dim=2))
            yield step
    raise Problem(f"replayed has {n} steps, the reference has {steps}; replay this reference, once a call")


def check_replayed(step: ReferenceStep | None, rows: int, maps: bool) -> None:
    """Raises Problem for a kept step that a method cannot read."""
    if step is None or not step.kv or maps and not step.qk or len(next(iter(step.kv.values()))[0]) < rows:
        raise Problem("replayed lacks what the method reads at a step; keep list(replay(model, ref, "
                      f"rows={rows}, maps={maps}))")


# ---- where sampling starts -------------------------------------------------------------------------------------

def initial_latents(ref: Reference, method: Method, seeds: Sequence[int]) -> Tensor:
    """z_T of each seed, (N,4,h,w), from a CPU generator of its own: the same alone or in any batch."""
    if not seeds:
        raise Problem("seeds is empty, expected one or more whole numbers; each is a picture")
    expect_all("seeds", seeds, Integral, "whole numbers")
    return torch.cat([initial_latent(ref.chain[-1:], method, seed) for seed in seeds])


def initial_latent(z_T: Tensor, method: Method, seed: int) -> Tensor:
    """One seed's z_T, (1,4,h,w), from the reference's z̄_T. "gaussian" keeps its moments in each channel, as the
    sixth equation of RIVAL's paper does."""
    generator, z = torch.Generator().manual_seed(int(seed)), z_T
    if method.init == "shuffle":  # one permutation of the cells for all channels keeps each cell's vector whole
        order = torch.randperm(z[0, 0].numel(), generator=generator).to(z.device)
        z = z.flatten(2)[:, :, order].view_as(z)
    elif method.init == "random":
        z = draw_noise(z_T, generator)
    elif method.init == "gaussian":
        z = z_T.mean((2, 3), keepdim=True) + z_T.std((2, 3), keepdim=True) * draw_noise(z_T, generator)
    if method.diversity:  # variance-preserving: what was N(0,1) stays N(0,1)
        z = (1 - method.diversity) ** 0.5 * z + method.diversity**0.5 * draw_noise(z_T, generator)
    return z
