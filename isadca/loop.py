"""The method: one loop that denoises variations of a reference under ISA, DCA and λ.

Read `sample` first; it is Algorithm 1 of the paper. `predict` is one step's noise in three stages: which rows, what
noise, how mixed. To try an idea, write a function of `Controls` and pass it as the method's `mix`.

Shapes: N variations of one run, one per seed; G guidance halves, [unconditional, text]; (4,h,w) a latent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .attention import KV, Attend, attend, by_kind, by_rows, dca, in_layers, isa, joined, masked
from .common.images import to_images
from .common.progress import Progress, shown, silent
from .methods import ISADCA, Method, method_named
from .networks.blend_isa import blend_isa
from .networks.model import Model, Watch
from .reference import Reference, ReferenceStep, initial_latents, invert, replay_all


@dataclass(frozen=True)
class Run:
    """One system, one prompt, one picture per seed. A prompt may be its embedding, (M,D), as `Model.context` gives."""

    prompt: str | Tensor
    method: Method = ISADCA
    seeds: tuple[int, ...] = (0,)
    negative: str | Tensor = ""


@dataclass(frozen=True)
class Options:
    """How `sample` goes about its work."""

    replayed: Iterable[ReferenceStep | None] | None = None  # a kept list(replay(...)) of the reference
    at_once: int = 5                      # steps of the reference in one call of the UNet
    rows_at_once: int = 64                # rows of one call at most; a method of one's own gets its N whole
    also: Sequence[Reference] = ()        # more references: their keys, values and image tokens join the first one's
    mask: Tensor | None = None            # (h,w): the reference's control acts where it is 1
    keep: Tensor | None = None            # (h,w): where it is 1, the reference's own latents stay
    image_embeds: Tensor | None = None    # replaces the references' CLIP embedding
    kernel: Attend = attend               # what attends in the end
    progress: Progress | bool = silent
    on_step: Callable[[Run, int, Tensor, "Noise"], Tensor | None] | None = None


class Conditions(NamedTuple):
    """What a run's steps share: it does not depend on t."""

    context: Tensor                       # (G,M,D), the text of each guidance half
    text_kv: list[KV]                     # of each half, the UNet's keys and values of it, one row
    words: list[tuple[str, list[int]]]    # the prompt's words, each with its rows of the context
    ip_kv: KV                             # rows (G,H,n,d); empty without an image branch
    kept: dict                            # empty at first: what a method of one's own leaves for its later steps


class Controls(NamedTuple):
    """What an attention function can be made of, at one step. The rows of q are [unconditional: N | text: N]."""

    z: Tensor                             # z_t, (N,4,h,w)
    t: int                                # training step, 1000 ... 0
    i: int                                # number of the step, 0 ... steps - 1
    steps: int
    lam: float | Tensor                   # λ_t
    conditions: Conditions
    ref_kv: KV                            # the reference's keys and values at t, by site name
    ref_eps: Tensor | None                # the noise predicted for it
    mask: Tensor | None
    method: Method
    kernel: Attend
    ref_qk: KV = {}                       # its queries and keys in every layer, if the method has `ref_maps`
    ref_z: Tensor | None = None           # z̄_t of every reference, (R,4,h,w)

    @property
    def n(self) -> int:
        return len(self.z)

    @property
    def halves(self) -> int:
        return len(self.conditions.context)

    @property
    def ip_kv(self) -> KV:
        return self.conditions.ip_kv


class Guided(NamedTuple):
    """One row of the UNet for each variation. Guidance adds weight × (its noise - the first row's noise)."""

    context: Tensor | KV                  # (1,M,D), or its keys and values
    attend: Attend
    weight: float


class Noise(NamedTuple):
    """The guided predictions of the two branches, and Eq. 9 of them, (N,4,h,w) each. A single branch is all three."""

    isa: Tensor
    dca: Tensor
    mixed: Tensor


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------

def sample(model: Model, ref: Reference, runs: list[Run], **options) -> list[Tensor]:
    """Algorithm 1, for several runs side by side: the reference is replayed once, whatever their number.

    Returns z_0 of each run, (N,4,h,w). `options` are those of `Options`. At each step the runs are computed in their
    order, so that a later one may read what an earlier one's attention left. `on_step(run, t, z_t, noise)` is called
    before each update; it may return another z_t, and the noise is then predicted from that.
    Raises Problem for what the method, the model or the reference do not allow.
    """
    o, layers = Options(**options), len(model.unet.sites) // 2
    runs = [replace(run, method=run.method.check(model.schedule.config.train_steps, layers)) for run in runs]
    methods = [run.method for run in runs]
    replayed = iter(replay_all(model, [ref, *o.also], methods, o.at_once, o.kernel, o.replayed))
    told = conditions(model, ref, runs, o)
    zs = [initial_latents(ref, run.method, run.seeds) for run in runs]
    keep = None if o.keep is None else F.interpolate(o.keep[None, None].to(ref.chain), ref.chain.shape[2:], mode="area")
    watch = Watch(model, "sampling")
    for i, stride in enumerate(shown(o.progress)(model.schedule.steps(ref.steps), "sampling")):
        reference_step = next(replayed)
        for j, run in enumerate(runs):
            controls = controls_at(model, stride.t, i, ref, run, zs[j], told[j], reference_step, o)
            if run.method.before_step:
                controls = controls._replace(z=run.method.before_step(model, controls))
            noise = predict_all(model, controls, o.rows_at_once)
            changed = o.on_step(run, stride.t, controls.z, noise) if o.on_step else None
            if isinstance(changed, Tensor):
                controls = controls._replace(z=changed)
                noise = predict_all(model, controls, o.rows_at_once)
            z = model.schedule.step(controls.z, noise.mixed, stride)
            if keep is not None:
                z = torch.lerp(z, ref.chain[ref.steps - i - 1], keep)  # what stays is re-read, and cannot drift
            zs[j] = watch(z, stride.t)
    watch.done()
    return zs


def controls_at(model: Model, t: int, i: int, ref: Reference, run: Run, z: Tensor, told: Conditions,
                step: ReferenceStep | None, o: Options) -> Controls:
    """One run's controls at one step, with the rows of the reference that its method reads."""
    method = run.method
    lam = method.lam_at(t, model.schedule.config.train_steps)
    lam = lam.to(z) if isinstance(lam, Tensor) else lam
    rows = min(method.ref_rows, len(told.context))
    kv = {name: (k[-rows:], v[-rows:]) for name, (k, v) in step.kv.items()} if step else {}
    return Controls(z, t, i, ref.steps, lam, told, kv, step.eps if step else None, o.mask, method, o.kernel,
                    {name: (q[-1:], k[-1:]) for name, (q, k) in step.qk.items()} if step else {},
                    torch.stack([each.chain[each.steps - i] for each in (ref, *o.also)]))


def predict_all(model: Model, controls: Controls, rows_at_once: int) -> Noise:
    """`predict` for a part of the N variations at a time. The user's own method may mix them, so it gets them whole."""
    mix = controls.method.mix
    at_once = controls.n if callable(mix) else max(1, rows_at_once // (4 if mix == "noise" else 2))
    parts = [predict(model, controls._replace(z=z)) for z in controls.z.split(at_once)]
    return Noise(*map(torch.cat, zip(*parts)))


# ---- one step --------------------------------------------------------------------------------------------------

def predict(model: Model, controls: Controls) -> Noise:
    """Eq. 9: λ · ISA + (1 - λ) · DCA, between the noise that the two branches predict from the shared z_t.

    The DDIM step is affine in the noise and λ + (1 - λ) = 1, so this mixes the two updated latents, too.
    """
    noise = guided_noise(model, controls, branches(controls))
    eps_isa, eps_dca = noise[0], noise[-1]                          # a single branch is both
    if controls.ref_eps is not None and controls.t > controls.method.adain_above:
        eps_isa = adain(eps_isa, controls.ref_eps)                  # before mixing, so that λ = 1 is RIVAL exactly
    return Noise(eps_isa, eps_dca, torch.lerp(eps_dca, eps_isa, controls.lam))


def branches(controls: Controls) -> list[list[Guided]]:
    """Which rows: one branch, or two whose noise will be mixed; each is a row for every guidance half."""
    made = attends(controls)
    halves, m = controls.conditions.text_kv, controls.method.guidance
    found = [f if isinstance(f, list) else [Guided(half, f, m) for half in halves]
             for f in (made if isinstance(made, tuple) else (made,))]
    if controls.mask is None:
        return found
    within = {row.attend: masked(row.attend, controls.kernel, controls.mask) for rows in found for row in rows}
    return [[row._replace(attend=within[row.attend]) for row in rows] for rows in found]


def attends(controls: Controls) -> Attend | tuple[Attend, Attend] | list[Guided]:
    """What the step attends to: one function; two, whose noise is mixed; or a list of the user's guidance rows."""
    method, lam = controls.method, controls.lam
    if not method.is_active(controls.t):
        return controls.kernel
    if callable(method.mix):
        return method.mix(controls)
    if method.mix == "attention":
        return mix_in_attention(controls)
    return isa_of(controls) if lam == 1 else dca_of(controls) if lam == 0 else (isa_of(controls), dca_of(controls))


def isa_of(controls: Controls) -> Attend:
    """The ISA branch, in the method's layers: reference alone or reference and self, as its threshold says."""
    mode = "replace" if controls.t > controls.method.replace_above else "append"
    return in_layers(controls.method.layers, isa(controls.ref_kv, mode, controls.kernel), controls.kernel)


def dca_of(controls: Controls, share: float | Tensor = 1.0) -> Attend:
    """The DCA branch, in the method's layers; `share` scales the image's part of it."""
    method, kernel = controls.method, controls.kernel
    return in_layers(method.ip_layers, dca(controls.ip_kv, share * method.ip_scale, kernel), kernel)


def mix_in_attention(controls: Controls) -> Attend:
    """The other reading of λ: mix inside every block, at half the rows. Self-attention is (1-λ)·plain + λ·ISA; in
    cross-attention the text is in both branches, so the image's share is what (1-λ) scales."""
    method, lam, kernel = controls.method, controls.lam, controls.kernel
    mode = "replace" if controls.t > method.replace_above else "append"
    mixed = in_layers(method.layers, blend_isa(controls.ref_kv, lam, mode, kernel), kernel)
    return by_kind(mixed, dca_of(controls, 1 - lam))


def guided_noise(model: Model, controls: Controls, branches: list[list[Guided]]) -> list[Tensor]:
    """What noise: the guided prediction of each branch, (N,4,h,w), all rows in one call of the UNet."""
    n, rows = controls.n, [row for branch in branches for row in branch]
    groups = [(n * len(list(same)), f) for f, same in groupby(rows, lambda row: row.attend)]
    attend = groups[-1][1]
    for size, f in groups[-2::-1]:
        attend = by_rows(size, f, attend)
    context = joined([row.context if isinstance(row.context, dict) else model.unet.keys_values(row.context)
                      for row in rows], dim=0)
    edit = controls.method.edit and controls.method.edit(controls)
    eps = iter(model.noise(controls.z.repeat(len(rows), 1, 1, 1), controls.t, context, attend, edit).split(n))
    return [guide(list(islice(eps, len(branch))), *(row.weight for row in branch[1:])) for branch in branches]


def guide(eps: Sequence[Tensor], *weights: float) -> Tensor:
    """Classifier-free guidance, ε_u + m (ε_c - ε_u), arXiv 2207.12598; with more rows, a weight for each of them."""
    return eps[0] + sum(weight * (other - eps[0]) for weight, other in zip(weights, eps[1:]))


def adain(x: Tensor, ref: Tensor) -> Tensor:
    """x with ref's mean and deviation, per row and channel: RIVAL's noise alignment. (N,4,h,w), (1 or N,4,h,w)."""
    def moments(y):
        return y.mean((2, 3), keepdim=True), (y.var((2, 3), keepdim=True) + 1e-5).sqrt()
    (mean, std), (ref_mean, ref_std) = moments(x), moments(ref)
    return (x - mean) / std * ref_std + ref_mean


# ---- what the steps share --------------------------------------------------------------------------------------

def conditions(model: Model, ref: Reference, runs: list[Run], o: Options = Options()) -> list[Conditions]:
    """Each run's text and image prompt as the UNet reads them. The image encoder runs once for all."""
    tokens = None
    if model.ip_adapter is not None and any(run.method.wants_image for run in runs):
        tokens = torch.cat([model.image_tokens(each.original or each.image, o.image_embeds)
                            for each in (ref, *(() if o.image_embeds is not None else o.also))], dim=1)
    return [condition(model, run, tokens) for run in runs]


def condition(model: Model, run: Run, tokens: Tensor | None) -> Conditions:
    """`tokens` are the image prompt's, [unconditional, image], (2,n,D)."""
    prompts = [run.negative, run.prompt] if run.method.guidance != 1 else [run.prompt]
    words = model.tokenizer.words(run.prompt) if isinstance(run.prompt, str) else []
    context = model.context(prompts)
    text_kv = [model.unet.keys_values(half) for half in context.split(1)]
    if tokens is None or not run.method.wants_image:
        return Conditions(context, text_kv, words, {}, {})
    kv = model.ip_adapter.keys_values(tokens[-len(prompts):], model.unet.sites, model.unet.config.n_heads)
    return Conditions(context, text_kv, words, kv, {})


# ---- in one call -----------------------------------------------------------------------------------------------

def vary(model: Model, ref: Reference | Image.Image | str | Path, prompt: str | Sequence[str],
         method: Method | str = ISADCA, seeds: Iterable[int] | int = (0,), negative: str = "",
         **options) -> list[Image.Image]:
    """Variations of a reference that follow `prompt`, one picture per seed; of several prompts, one after the other.

    A picture or its path is inverted first. `options` are fields of `Method`, which they change, and of `Options`.
    """
    changes = {field.name: options.pop(field.name) for field in fields(Method) if field.name in options}
    method = replace(method_named(method) if isinstance(method, str) else method, **changes)
    seeds = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    if not isinstance(ref, Reference):
        ref = invert(model, ref, progress=shown(options.get("progress", silent)))
    prompts = [prompt] if isinstance(prompt, (str, Tensor)) else prompt
    zs = sample(model, ref, [Run(each, method, seeds, negative) for each in prompts], **options)
    return [picture for z in zs for picture in decode(model, z)]


def decode(model: Model, z: Tensor) -> list[Image.Image]:
    """z_0 (N,4,h,w) -> pictures, decoded one by one so that memory does not grow with N."""
    return [image for row in z.split(1) for image in to_images(model.decode(row))]
