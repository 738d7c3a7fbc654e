"""Vectors of the whole method: inversion, and Algorithm 1 from z_T to z_0 for every preset and setting."""

from dataclasses import asdict, replace

import numpy as np
import torch

from cases import Case, File
from make_loop import Mistakes, Model, Settings, counted_phases, denoise, invert
from make_networks import stored

TOLERANCE = 1e-9
RIVAL = Settings(lam=1.0, replace_above=601, adain_above=600, t_start=961, ip_scale=0.0)
PRESETS = {  # settings, where z_T comes from, steps
    "isadca": (Settings(), "inverted", 6),
    "rival": (RIVAL, "shuffle", 50),
    "rival-edit": (replace(RIVAL, t_start=901), "inverted", 12),
    "rival-variation": (replace(RIVAL, t_start=1000, guidance=5.0, ref_rows=2), "shuffle", 6),
    "ip-adapter": (Settings(lam=0.0, guidance=7.5), "random", 6),
    "masactrl": (Settings(lam=1.0, guidance=7.5, replace_above=-1, t_start=901, layers=(-6, -5, -4, -3, -2, -1),
                          ip_scale=0.0), "inverted", 12),
    "plain": (Settings(lam=0.0, guidance=7.5, ip_scale=0.0), "random", 6),
}
VARIANTS = {
    "lambda 0": Settings(lam=0.0), "lambda 1": Settings(lam=1.0),
    "lambda linear": Settings(lam={"linear": [1.0, 0.2]}), "lambda cosine": Settings(lam={"cosine": [0.1, 0.9]}),
    "mix in attention": Settings(mix="attention"), "mix in attention, lambda 0": Settings(mix="attention", lam=0.0),
    "mix in attention, lambda 1": Settings(mix="attention", lam=1.0),
    "mix in attention, lambda linear": Settings(mix="attention", lam={"linear": [0.9, 0.1]}),
    "K 333, a step of the grid": Settings(k=333),
    "control from 665 down": Settings(t_start=665), "K 167, mix in attention": Settings(k=167, mix="attention"),
    "reference alone above 333": Settings(replace_above=333), "noise alignment above 400": Settings(adain_above=400),
    "reference alone and alignment, mix in attention": Settings(replace_above=333, mix="attention", adain_above=400),
    "the image at 0.4": Settings(ip_scale=0.4), "ISA in three layers": Settings(layers=(0, 2, -1)),
    "without guidance": Settings(guidance=1.0), "guidance 3": Settings(guidance=3.0),
}


class Scene:
    """The inputs that all cases share."""

    def __init__(self):
        rng, self.model = np.random.default_rng(23), Model()
        self.z0 = rng.standard_normal((1, 4, 8, 4))
        features = rng.standard_normal((1, 10))
        tokens = self.model.project(torch.from_numpy(np.concatenate([0 * features, features]))).numpy()
        context = rng.standard_normal((2, 5, 12))
        self.given = dict(context=context, source=rng.standard_normal((1, 5, 12)), tokens=tokens)
        self.given["empty"] = rng.standard_normal((1, 5, 12))
        self.chains = {steps: invert(self.model, self.z0, self.given["source"], steps) for steps in (6, 12, 50)}

    def start(self, init, seed, steps):
        """z_T of one variation."""
        z, generator = self.chains[steps][-1:], torch.Generator().manual_seed(seed)
        if init == "shuffle":
            order = torch.randperm(z[0, 0].size, generator=generator).numpy()
            return z.reshape(1, 4, -1)[:, :, order].reshape(z.shape)
        if init == "random":
            return torch.randn(z.shape, generator=generator, dtype=torch.float64).numpy()
        return z

    def case(self, name, settings, init="inverted", steps=6, seeds=(0,), mistakes=None):
        """One run; `mistakes` maps what it looks like to Mistakes, other settings, or a function of the loop's."""
        starts = [self.start(init, seed, steps) for seed in seeds]

        def run(wrong):
            changed = wrong if isinstance(wrong, Settings) else settings
            how = wrong if callable(wrong) else denoise
            more = [wrong] if isinstance(wrong, Mistakes) else []
            paths = [how(self.model, self.chains[steps], self.given, changed, z, *more) for z in starts]
            return np.stack(paths, axis=1)
        knobs = asdict(settings) | {"layers": settings.layers and list(settings.layers)}
        arguments = dict(stored("unet"), adapter=File("model/ip-adapter_base.safetensors"), chain=self.chains[steps],
                         **self.given, settings=knobs, z_T=np.concatenate(starts), init=init, seeds=list(seeds))
        return Case("algorithm1", name, arguments, run(None), TOLERANCE,
                    {what: run(wrong) for what, wrong in (mistakes or {}).items()})


def inversion_cases(scene):
    for steps in scene.chains:
        mistakes = {} if steps != 6 else {
            "the network is told the time of the lower level, not of the upper":
            invert(scene.model, scene.z0, scene.given["source"], steps, label="lower")}
        yield Case("invert", f"{steps} steps", dict(stored("unet"), z0=scene.z0, source=scene.given["source"],
                                                    steps=steps), scene.chains[steps], TOLERANCE, mistakes)


COMMON = {
    "your reference is one step late": Mistakes(late=1),
    "your reference is one step early": Mistakes(late=-1),
    "the reference's keys are those of the inversion pass": Mistakes(inverting=True),
    "ISA is in the conditional half alone": Mistakes(conditional_only=True),
    "the reference is left out": Mistakes(no_reference=True),
    "lambda is the wrong way round": Mistakes(swapped_lambda=True),
}


def algorithm_cases(scene):
    one_row = replace(PRESETS["rival-variation"][0], ref_rows=1)
    extra = {"isadca": COMMON, "rival-variation": {
        "both guidance halves read the reference of the prompt; the unconditional one has its own": one_row}}
    for name, (settings, init, steps) in PRESETS.items():
        yield scene.case(name, settings, init, steps, mistakes=extra.get(name))
    k = replace(VARIANTS["K 333, a step of the grid"], k=332)
    start = replace(VARIANTS["control from 665 down"], t_start=664)
    alone = VARIANTS["reference alone above 333"]
    extra = {
        "K 333, a step of the grid": {"control is on for t = K, too; it is on for t > K": k},
        "control from 665 down": {"control is off at t_start; it is on for t <= t_start": start},
        "reference alone above 333": {
            "the phase is counted by calls and not read off t: a second picture starts in the wrong one":
            counted_phases,
            "the reference is alone at the threshold, too; it is alone above it": replace(alone, replace_above=332)},
        "noise alignment above 400": {"the noise is aligned after mixing, it is before": Mistakes(align_after=True)},
        "ISA in three layers": {
            "layers are numbered in the order of the file, down, up, mid; it is that of execution":
            Settings(layers=(0, 3, 2))},
        "mix in attention": {"lambda is between the noise of two branches": Settings(), **COMMON},
    }
    for name, settings in VARIANTS.items():
        yield scene.case(name, settings, mistakes=extra.get(name))
    yield scene.case("two variations at once", Settings(), "shuffle", seeds=(0, 1), mistakes={
        "the reference is left out when there is more than one variation": Mistakes(no_reference=True)})


def cases():
    with torch.inference_mode():
        scene = Scene()
        return [*inversion_cases(scene), *algorithm_cases(scene)]
