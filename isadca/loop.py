"""The method: one loop that denoises variations of a reference under ISA, DCA and λ.

Read `sample` first; it is Algorithm 1 of the paper. What a step attends to is decided in `branches`, and nowhere
else. To try an idea, write a function Controls -> Attend and pass it as the method's `mix`.

Shapes: N variations of one run, one per seed; G guidance halves, [unconditional, text]; (4,h,w) a latent.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .attention import KV, Attend, attend as plain_attend, blend_isa, by_kind, by_rows, dca, where
from .common.images import to_images
from .common.progress import Progress, silent
from .ddim import step
from .methods import ISADCA, Method
from .networks.model import Model, Watch
from .reference import Reference, Seen, replay


@dataclass(frozen=True)
class Run:
    """One system, one prompt, one picture per seed."""

    prompt: str
    method: Method = ISADCA
    seeds: tuple[int, ...] = (0,)
    negative: str = ""


class Controls(NamedTuple):
    """What an attention function can be made of, at one step."""

    t: int          # training step, 1000 ... 0
    lam: float      # λ_t
    ref_kv: KV      # the reference's keys and values at t, by site name
    ip_kv: KV       # the image prompt's
    method: Method
    kernel: Attend  # what attends in the end


class Noise(NamedTuple):
    """The two guided predictions that Eq. 9 mixes, and the mix; (N,4,h,w) each."""

    isa: Tensor
    dca: Tensor
    mixed: Tensor


class Conditions(NamedTuple):
    context: Tensor  # (G,M,D)
    ip_kv: KV        # rows (G,H,n,d); empty without an image branch


def sample(model: Model, ref: Reference, runs: list[Run], replayed: Iterable[Seen | None] | None = None,
           at_once: int = 5, rows_at_once: int = 64, image_embeds: Tensor | None = None,
           kernel: Attend = plain_attend, progress: Progress = silent,
           on_step: Callable[[Run, int, Tensor, Noise], None] | None = None) -> list[Tensor]:
    """Algorithm 1, for several runs side by side: the reference is replayed once, whatever their number.

    Returns z_0 of each run, (N,4,h,w). `replayed` is a kept `list(replay(...))`, otherwise `at_once` steps are
    replayed at a time; `rows_at_once` bounds the batch of one UNet call; `image_embeds` replaces the reference's
    CLIP embedding; `on_step(run, t, z_t, noise)` is called before each update.
    """
    T = model.schedule.config.train_steps
    runs = [replace(run, method=run.method.check(T, len(model.unet.sites) // 2)) for run in runs]
    if replayed is None:
        wanted = lambda t: any(run.method.wants_reference(t, T) for run in runs)
        replayed = replay(model, ref, wanted, at_once, kernel)
    told = [condition(model, ref, run, image_embeds) for run in runs]
    zs = [initial_latents(ref, run) for run in runs]
    watch = Watch(model, "sampling")
    for (t, t_prev), seen in zip(progress(model.schedule.steps(ref.steps), "sampling"), replayed):
        levels = model.schedule.alpha_bar(t), model.schedule.alpha_bar(t_prev)
        for i, run in enumerate(runs):
            rows = max(1, rows_at_once // (4 if run.method.mix == "noise" else 2))
            parts = [predict(model, z, t, told[i], seen, run.method, kernel) for z in zs[i].split(rows)]
            noise = Noise(*map(torch.cat, zip(*parts)))
            if on_step:
                on_step(run, t, zs[i], noise)
            zs[i] = watch(step(zs[i], noise.mixed, *levels), t)
    watch.done()
    return zs


def predict(model: Model, z: Tensor, t: int, told: Conditions, seen: Seen | None, method: Method,
            kernel: Attend) -> Noise:
    """Eq. 9: λ · ISA + (1 - λ) · DCA, between the noise that the two branches predict from the shared z_t.

    The DDIM step is affine in the noise and λ + (1 - λ) = 1, so this mixes the two updated latents, too.
    """
    lam = method.lam_at(t, model.schedule.config.train_steps)
    controls = Controls(t, lam, seen.kv if seen else {}, told.ip_kv, method, kernel)
    attends = branches(controls)
    n, halves = len(z), len(told.context)
    rows = z.repeat(halves * len(attends), 1, 1, 1)                 # [ISA u | ISA c | DCA u | DCA c], n rows each
    context = told.context.repeat_interleave(n, 0).repeat(len(attends), 1, 1)
    attend = attends[0] if len(attends) == 1 else by_rows(halves * n, *attends)
    eps = model.noise(rows, t, context, attend).chunk(len(attends))
    eps_isa, eps_dca = (guide(e, halves, method.guidance) for e in (eps[0], eps[-1]))
    if t > method.adain_above and seen:
        eps_isa = adain(eps_isa, seen.eps)                          # before mixing, so that λ = 1 is RIVAL exactly
    return Noise(eps_isa, eps_dca, torch.lerp(eps_dca, eps_isa, lam))


def branches(controls: Controls) -> list[Attend]:
    """What the step attends to: one function, or two where the noise of two branches will be mixed."""
    t, lam, _, _, method, kernel = controls
    if not method.controls(t):
        return [kernel]
    if callable(method.mix):
        return [method.mix(controls)]
    if method.mix == "attention":
        return [mix_in_attention(controls)]
    isa_branch, dca_branch = isa_of(controls), dca(controls.ip_kv, method.ip_scale, kernel)
    return [isa_branch] if lam == 1 else [dca_branch] if lam == 0 else [isa_branch, dca_branch]


def isa_of(controls: Controls, weight: float = 1.0) -> Attend:
    """The ISA branch: in the method's layers, reference alone or reference and self, as its thresholds say.
    `weight` below 1 blends plain attention into it."""
    method, kernel = controls.method, controls.kernel
    mode = "replace" if controls.t > method.replace_above else "append"
    attend_isa = blend_isa(controls.ref_kv, weight, mode, kernel)
    return attend_isa if method.layers is None else where(lambda s: s.layer in method.layers, attend_isa, kernel)


def mix_in_attention(controls: Controls) -> Attend:
    """The other reading of λ: mix inside every block, at half the rows. Self-attention is (1-λ)·plain + λ·ISA; in
    cross-attention the text is in both branches, so the image's share is what (1-λ) scales."""
    _, lam, _, ip_kv, method, kernel = controls
    return by_kind(isa_of(controls, lam), dca(ip_kv, (1 - lam) * method.ip_scale, kernel))


def guide(eps: Tensor, halves: int, m: float) -> Tensor:
    """Classifier-free guidance, ε_u + m (ε_c - ε_u); arXiv 2207.12598. (G·N,4,h,w) -> (N,4,h,w)."""
    if halves == 1:
        return eps
    eps_u, eps_c = eps.chunk(2)
    return eps_u + m * (eps_c - eps_u)


def adain(x: Tensor, ref: Tensor) -> Tensor:
    """x with ref's mean and deviation, per row and channel: RIVAL's noise alignment. (N,4,h,w), (1 or N,4,h,w)."""
    def moments(y):
        return y.mean((2, 3), keepdim=True), (y.var((2, 3), keepdim=True) + 1e-5).sqrt()
    (mean, std), (ref_mean, ref_std) = moments(x), moments(ref)
    return (x - mean) / std * ref_std + ref_mean


def condition(model: Model, ref: Reference, run: Run, image_embeds: Tensor | None = None) -> Conditions:
    """The prompts' context and the image prompt's keys and values, by guidance half. They do not depend on t."""
    guided = run.method.guidance != 1
    context = model.context([run.negative, run.prompt] if guided else [run.prompt])
    if model.ip_adapter is None or not run.method.wants_image:
        return Conditions(context, {})
    tokens = model.image_tokens(ref.image, image_embeds)
    unet = model.unet
    kv = model.ip_adapter.keys_values(tokens if guided else tokens[1:], unet.sites, unet.config.n_heads)
    return Conditions(context, kv)


def initial_latents(ref: Reference, run: Run) -> Tensor:
    """z_T of each seed, (N,4,h,w), from a CPU generator of its own: the same alone or in any batch."""
    return torch.cat([_initial_latent(ref.chain[-1:], run.method, seed) for seed in run.seeds])


def _initial_latent(z_T: Tensor, method: Method, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(z_T.shape, generator=generator, dtype=torch.float64).to(z_T)
    z = z_T
    if method.init == "shuffle":  # one permutation of the cells for all channels keeps each cell's vector whole
        order = torch.randperm(z[0, 0].numel(), generator=generator).to(z.device)
        z = z.flatten(2)[:, :, order].view_as(z)
    elif method.init == "random":
        z = normal()
    if method.diversity:  # variance-preserving: what was N(0,1) stays N(0,1)
        z = (1 - method.diversity) ** 0.5 * z + method.diversity**0.5 * normal()
    return z


def vary(model: Model, ref: Reference, prompt: str, method: Method = ISADCA, seeds: Iterable[int] = (0,),
         negative: str = "", **options) -> list[Image.Image]:
    """Variations of a reference that follow `prompt`, one picture per seed. `options` are those of `sample`."""
    [z] = sample(model, ref, [Run(prompt, method, tuple(seeds), negative)], **options)
    return decode(model, z)


def decode(model: Model, z: Tensor) -> list[Image.Image]:
    """z_0 (N,4,h,w) -> pictures, decoded one by one so that memory does not grow with N."""
    return [image for row in z.split(1) for image in to_images(model.decode(row))]
