"""The method: one loop that denoises variations of a reference under ISA, DCA and λ.

Read `sample` first; it is Algorithm 1 of the paper. `predict` gives one step's noise in three stages: which rows,
what noise, how mixed. To try an idea, write a function of `Controls` and pass it as the method's `mix`.

Shapes: N variations of one run, one per seed; G guidance halves, [unconditional, text]; (4,h,w) a latent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .attention import KV, Attend, attend, by_kind, by_rows, dca, in_layers, isa, joined, rows_of
from .common.images import RECIPE_KEY, to_images
from .common.problem import Problem, expect, expect_all, expect_names
from .common.progress import Progress, shown, silent
from .ddim import adain
from .methods import ISADCA, Method, Run, method_named
from .networks.model import Model, Watch
from .reference import Reference, ReferenceStep, initial_latents, invert, replay_all


@dataclass(frozen=True)
class Options:
    """How `sample` goes about its work."""

    replayed: Iterable[ReferenceStep | None] | None = None  # a kept list(replay(...)) of the reference
    at_once: int = 5                      # steps of the reference in one call of the UNet
    rows_at_once: int = 64                # most rows of one call; a method of one's own gets its N whole
    also: Sequence[Reference] = ()        # more references, whose keys, values and image tokens are joined to it
    mask: Tensor | None = None            # (h,w): the method controls what is 1, the rest is plain
    keep: Tensor | None = None            # (h,w): what is 1 stays the reference's own latents
    image_embeds: Tensor | None = None    # replaces the references' CLIP embedding
    kernel: Attend = attend               # what attends in the end
    progress: Progress | bool = silent
    on_step: Callable[[Run, int, Tensor, "Noise"], Tensor | None] | None = None

    def __post_init__(self):
        maps = [m if getattr(m, "ndim", 2) == 2 else tuple(m.shape) for m in (self.mask, self.keep)]
        expect_all("mask or keep", maps, Tensor | None, "a tensor (h,w) from 0 to 1")
        expect_all("also", self.also, Reference, "a list of what isadca.invert gives")


class Conditions(NamedTuple):
    """What the steps of a run share: it does not depend on t."""

    context: Tensor                       # (G,M,D), the text of each guidance half
    text_kv: list[KV]                     # each half's keys and values in the UNet, one row
    words: list[tuple[str, list[int]]]    # the prompt's words, each with its rows of the context
    ip_kv: KV                             # rows (G,H,n,d); empty without an image branch
    kept: dict                            # empty at first: what a method of one's own leaves for its later steps


class Controls(NamedTuple):
    """What an attention function can be made of, at one step. The rows of q are [unconditional: N | text: N]."""

    z: Tensor                             # z_t, (N,4,h,w)
    t: int                                # training step, 999 ... 0
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
    """The guided predictions of the two branches and their mix, (N,4,h,w) each. A single branch is all three."""

    isa: Tensor
    dca: Tensor
    mixed: Tensor


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------

def sample(model: Model, ref: Reference, runs: list[Run], **options) -> list[Tensor]:
    """Algorithm 1, for several runs side by side: the reference is replayed once, whatever their number.

    Returns z_0 of each run, (N,4,h,w). `options` are the fields of `Options`. At each step the runs are computed in
    their order, so that a later one may read what an earlier one's attention left. `on_step(run, t, z_t, noise)` is
    called before each update; it may return another z_t, from which the noise is then predicted. Raises Problem.
    """
    o, layers = Options(**options), len(model.unet.sites) // 2
    runs = [replace(run, method=run.method.check(model.schedule.config.train_steps, layers)) for run in runs]
    replayed = replay_all(model, [ref, *o.also], [run.method for run in runs], o.at_once, o.kernel, o.replayed)
    shared = conditions(model, ref, runs, o)
    zs = [initial_latents(ref, run.method, run.seeds) for run in runs]
    watch = Watch(model, "sampling")
    for i, stride in enumerate(shown(o.progress)(model.schedule.steps(ref.steps), "sampling")):
        reference_step = next(replayed) or ReferenceStep({}, None)
        for j, run in enumerate(runs):
            controls = controls_at(model, stride.t, i, ref, run, zs[j], shared[j], reference_step, o)
            if run.method.before_step:
                controls = controls._replace(z=run.method.before_step(model, controls))
            noise = predict_in_parts(model, controls, o.rows_at_once)
            changed = o.on_step(run, stride.t, controls.z, noise) if o.on_step else None
            if isinstance(changed, Tensor):
                controls = controls._replace(z=changed)
                noise = predict_in_parts(model, controls, o.rows_at_once)
            z = model.schedule.step(controls.z, noise.mixed, stride)
            if o.keep is not None:  # read from the chain at every step, so that it cannot drift
                from .common.masks import at_grid
                z = torch.lerp(z, ref.chain[ref.steps - i - 1], at_grid(o.keep, z.shape[2:], z))
            zs[j] = watch(z, stride.t)
    watch.done()
    return zs


def controls_at(model: Model, t: int, i: int, ref: Reference, run: Run, z: Tensor, shared: Conditions,
                step: ReferenceStep, o: Options) -> Controls:
    """One run's controls at one step, with the rows of the reference that its method reads."""
    method, lam = run.method, run.method.lam_at(t, model.schedule.config.train_steps)
    return Controls(
        z=z, t=t, i=i, steps=ref.steps, conditions=shared, mask=o.mask, method=method, kernel=o.kernel,
        lam=lam.to(z) if isinstance(lam, Tensor) else lam, ref_eps=step.eps,
        ref_kv=rows_of(step.kv, slice(-min(method.ref_rows, len(shared.context)), None)),
        ref_qk=rows_of(step.qk, slice(-1, None)),
        ref_z=torch.stack([each.chain[each.steps - i] for each in (ref, *o.also)]))


def predict_in_parts(model: Model, controls: Controls, rows_at_once: int) -> Noise:
    """`predict` for some of the N variations at a time; for a method of one's own, which may mix them, for all. A
    variation has a row for each branch and guidance half."""
    mix = controls.method.mix
    at_once = controls.n if callable(mix) else max(1, rows_at_once // (4 if mix == "noise" else 2))
    parts = [predict(model, controls._replace(z=z)) for z in controls.z.split(at_once)]
    return Noise(*map(torch.cat, zip(*parts)))


# ---- one step: which rows, what noise, how mixed ---------------------------------------------------------------

def predict(model: Model, controls: Controls) -> Noise:
    """One step's noise in three stages."""
    branches = branches_of(controls)
    noise = noise_of(model, controls, branches)
    return mix_noise(controls, noise[0], noise[-1])  # a single branch is both


def branches_of(controls: Controls) -> list[list[Guided]]:
    """Which rows: one branch, or two whose noise will be mixed; each is a row for every guidance half."""
    made = attends(controls)
    halves, m = controls.conditions.text_kv, controls.method.guidance
    return [f if isinstance(f, list) else [Guided(half, f, m) for half in halves]
            for f in (made if isinstance(made, tuple) else (made,))]


def noise_of(model: Model, controls: Controls, branches: list[list[Guided]]) -> list[Tensor]:
    """What noise: the guided prediction of each branch, (N,4,h,w), all rows in one call of the UNet."""
    n, rows = controls.n, [row for branch in branches for row in branch]
    groups = [(f, n * len(list(same))) for f, same in groupby(row.attend for row in rows)]
    of_rows = groups[-1][0]
    for f, size in groups[-2::-1]:  # nested, the first group outermost
        of_rows = by_rows(size, f, of_rows)
    if controls.mask is not None:
        from .common.masks import masked
        of_rows = masked(of_rows, controls.kernel, controls.mask)
    context = joined([row.context if isinstance(row.context, dict) else model.unet.keys_values(row.context)
                      for row in rows], dim=0)
    edit = controls.method.edit and controls.method.edit(controls)
    eps = iter(model.noise(controls.z.repeat(len(rows), 1, 1, 1), controls.t, context, of_rows, edit).split(n))
    return [guide([next(eps) for _ in branch], *(row.weight for row in branch[1:])) for branch in branches]


def mix_noise(controls: Controls, eps_isa: Tensor, eps_dca: Tensor) -> Noise:
    """Eq. 9, how mixed: λ · ISA + (1 - λ) · DCA, the noise that the two branches predict from the shared z_t. The DDIM
    step is affine in the noise and λ + (1 - λ) = 1, so this mixes the two updated latents, too."""
    if controls.ref_eps is not None and controls.t > controls.method.adain_above:
        eps_isa = adain(eps_isa, controls.ref_eps)  # before mixing, so that λ = 1 is RIVAL exactly
    return Noise(eps_isa, eps_dca, torch.lerp(eps_dca, eps_isa, controls.lam))


def guide(eps: Sequence[Tensor], *weights: float) -> Tensor:
    """Classifier-free guidance, ε_u + m (ε_c - ε_u), arXiv 2207.12598; further rows bring a weight each."""
    return eps[0] + sum(weight * (other - eps[0]) for weight, other in zip(weights, eps[1:]))


# ---- what a step attends to ------------------------------------------------------------------------------------

def attends(controls: Controls) -> Attend | tuple[Attend, Attend] | list[Guided]:
    """One function; two, whose noise is mixed; or a list of the user's guidance rows."""
    method, lam = controls.method, controls.lam
    if not method.is_active(controls.t):
        return controls.kernel
    if callable(method.mix):
        return method.mix(controls)
    if method.mix == "attention":
        return mix_in_attention(controls)
    if lam in (0, 1):
        return isa_of(controls) if lam else dca_of(controls)
    return isa_of(controls), dca_of(controls)


def isa_of(controls: Controls) -> Attend:
    """The ISA branch, in the method's layers: z_t sees the reference and itself, or the reference alone."""
    method, kernel = controls.method, controls.kernel
    return in_layers(method.layers, isa(controls.ref_kv, method.isa_mode(controls.t), kernel), kernel)


def dca_of(controls: Controls, share: float | Tensor = 1.0) -> Attend:
    """The DCA branch, in the method's layers; `share` scales the image's part of it."""
    method, kernel = controls.method, controls.kernel
    return in_layers(method.ip_layers, dca(controls.ip_kv, share * method.ip_scale, kernel), kernel)


def mix_in_attention(controls: Controls) -> Attend:
    """The other reading of λ: mix inside every block, at half the rows. Self-attention is (1-λ)·plain + λ·ISA;
    in cross-attention, both branches have the text, so (1-λ) scales the image's share."""
    from .speed.blend_isa import blend_isa  # for this reading alone
    method, lam, kernel = controls.method, controls.lam, controls.kernel
    mixed = blend_isa(controls.ref_kv, lam, method.isa_mode(controls.t), kernel)
    return by_kind(in_layers(method.layers, mixed, kernel), dca_of(controls, 1 - lam))


# ---- what the steps share --------------------------------------------------------------------------------------

def conditions(model: Model, ref: Reference, runs: list[Run], o: Options = Options()) -> list[Conditions]:
    """Each run's text and image prompt as the UNet reads them. The image encoder runs once for all."""
    unet, adapter, tokens, found = model.unet, model.ip_adapter, None, []
    if adapter is not None and any(run.method.wants_image for run in runs):
        pictures = [ref, *o.also] if o.image_embeds is None else [ref]
        tokens = torch.cat([model.image_tokens(each.original or each.image, o.image_embeds)
                            for each in pictures], dim=1)               # (2,n,D), [unconditional, image]
    for run in runs:
        prompts = [run.prompt] if run.method.guidance == 1 else [run.negative, run.prompt]
        context = model.context(prompts)
        text_kv = [unet.keys_values(half) for half in context.split(1)]
        words = model.tokenizer.words(run.prompt) if isinstance(run.prompt, str) else []
        ip_kv: KV = {}
        if tokens is not None and run.method.wants_image:
            ip_kv = adapter.keys_values(tokens[-len(prompts):], unet.sites, unet.config.n_heads)
        found.append(Conditions(context, text_kv, words, ip_kv, kept={}))
    return found


# ---- in one call -----------------------------------------------------------------------------------------------

def vary(model: Model, ref: Reference | Image.Image | str | Path, prompt: str | Sequence[str],
         method: Method | str = ISADCA, seeds: Iterable[int] | int = (0,), negative: str = "",
         **options) -> list[Image.Image]:
    """Variations that follow a prompt, one per seed (3 is one seed, range(3) three); several prompts are taken in turn.

    A picture or its path is inverted first. `options` are fields of `Options`, and of `Method`, which they change.
    Each picture's `info` says how it was made; `save_png` writes that.
    """
    expect("model", model, Model, "what isadca.load gives")
    expect_names(options, {"seeds", "negative", *(field.name for each in (Method, Options) for field in fields(each))})
    changes = {field.name: options.pop(field.name) for field in fields(Method) if field.name in options}
    method = replace(method if isinstance(method, Method) else method_named(method), **changes)
    seeds = tuple(seeds) if isinstance(seeds, Iterable) else (seeds,)
    prompts: Sequence = prompt if isinstance(prompt, Sequence) and prompt and not isinstance(prompt, str) else [prompt]
    expect_all("prompt or negative", [negative, *prompts], (str, Tensor), "a text, or for prompts a list")
    if not isinstance(ref, Reference):
        ref = invert(model, ref, method.steps, progress=options.get("progress", silent))
    elif changes.get("steps", ref.steps) != ref.steps:
        raise Problem(f"steps is {method.steps}, the reference was inverted with {ref.steps}; give the picture itself")
    method = replace(method, steps=ref.steps)  # as the pictures' recipes say it
    runs, pictures = [Run(each, method, seeds, negative) for each in prompts], []
    for run, z in zip(runs, sample(model, ref, runs, **options)):
        for seed, picture in zip(seeds, decode(model, z)):
            picture.info[RECIPE_KEY] = {"command": "isadca.vary", "run": repr(replace(run, seeds=(seed,)))}
            pictures.append(picture)
    return pictures


def decode(model: Model, z: Tensor) -> list[Image.Image]:
    """z_0 (N,4,h,w) -> pictures, decoded one by one so that memory does not grow with N."""
    return [image for row in z.split(1) for image in to_images(model.decode(row))]
