"""The methods as values: all knobs of the sampling loop in one frozen dataclass, and the presets with their source.

`t` counts training steps, from 1000 (noise) down to 0. Thresholds are levels of t, whatever the number of steps.
RIVAL and MasaCtrl count their calls instead. At the 50 steps that both publish, the two agree; at 30, RIVAL's
changes come up to one step earlier, and MasaCtrl's four plain steps reach further down, as each is longer.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Union

from .common.problem import Problem, expect

if TYPE_CHECKING:  # the command line's help reads this file and does not wait for torch
    from torch import Tensor

Lambda = Union[float, "Tensor", Callable[[int, int], Union[float, "Tensor"]]]  # constant, or a function of (t, T)
INITS = ("inverted", "shuffle", "gaussian", "random")


def knob(default, help: str, choices: tuple[str, ...] | None = None, flag: bool = True):
    """A field of Method and, unless `flag` says no, a flag of the command line, with one help text for both."""
    return field(default=default, metadata={"about": help} | ({"help": help, "choices": choices} if flag else {}))


@dataclass(frozen=True)
class Method:
    """What one run does. The defaults are this project's reading of the paper."""

    name: str = knob("isadca", "in tables and in the names of files", flag=False)
    lam: Lambda = knob(0.7, "λ of Eq. 9: 1 is ISA alone, 0 is DCA (IP-Adapter) alone; or linear:1:0.3, cosine:1:0")
    mix: str | Callable = knob("noise", "where Eq. 9 mixes; in Python also your own function", ("noise", "attention"))
    before_step: Callable | None = knob(None, "a function of the model and Controls: the step's z_t", flag=False)
    edit: Callable | None = knob(None, "a function of Controls that gives the UNet's `edit`", flag=False)
    guidance: float = knob(7.0, "m of classifier-free guidance; 1 is without")
    k: int = knob(0, "K of Algorithm 1: control is on for k < t <= t-start, elsewhere a step is plain")
    t_start: int = knob(1000, "see --k")
    replace_above: int = knob(1000, "for t above, ISA sees the reference alone; below, reference and self")
    adain_above: int = knob(1000, "for t above, ISA's noise takes the reference noise's mean and deviation")
    layers: tuple[int, ...] | None = knob(None, "ISA in these transformer blocks only, such as 10-15 or 0,1,6")
    ref_rows: int = knob(1, "1: both guidance halves read one reference; 2: each its own, prompted like it", flag=False)
    ref_maps: bool = knob(False, "whether Controls have the reference's queries and keys, `ref_qk`", flag=False)
    ip_scale: float = knob(1.0, "weight of DCA's image branch")
    ip_layers: tuple[int, ...] | None = knob(None, "the image prompt in these transformer blocks only")
    init: str = knob("inverted", "z_T: the reference's, its cells shuffled, its moments alone, or noise", INITS)
    steps: int = knob(50, "of the inversion that is made for it; a Reference that is there has its own", flag=False)
    diversity: float = knob(0.0, "d from 0 to 1: z_T becomes sqrt(1-d) z_T + sqrt(d) noise")
    source: str = knob("the paper, Algorithm 1; Eq. 9 between the two branches' noise", "of the values", flag=False)

    def lam_at(self, t: int, T: int) -> "float | Tensor":
        """λ_t. A tensor stays one, so that gradients reach it. Raises Problem outside [0,1]."""
        lam = self.lam(t, T) if callable(self.lam) else self.lam
        if not (isinstance(lam, Real) or getattr(lam, "shape", None) in ((), (1,))) or not 0 <= lam <= 1:
            raise Problem(f"lam is {lam!r} at t = {t}, expected 0 to 1; 1 is ISA alone, 0 is DCA alone")
        return lam

    def is_active(self, t: int) -> bool:
        """Whether the step at t is under control; elsewhere it is plain text guidance."""
        return self.k < t <= self.t_start

    def wants_reference(self, t: int, T: int) -> bool:
        """Whether the step at t reads the reference's keys and values, or its noise."""
        in_use = self.is_active(t) or t > self.adain_above
        return in_use and bool(callable(self.mix) or self.lam_at(t, T) > 0)

    def isa_mode(self, t: int) -> str:
        """Of `attention.isa`: the reference alone, or reference and self."""
        return "replace" if t > self.replace_above else "append"

    @property
    def wants_image(self) -> bool:
        """Whether any step reads the image prompt."""
        return bool(self.ip_scale != 0 and (callable(self.mix) or self.lam != 1))

    @property
    def deterministic(self) -> bool:
        """Whether every seed gives the same picture."""
        return self.init == "inverted" and self.diversity == 0

    def check(self, T: int, n_layers: int | None = None) -> "Method":
        """Self, with `layers` counted from the start. Raises Problem, naming the field and what is allowed."""
        for f in fields(self):
            if type(f.default) in (int, float) and f.name != "lam":
                expect(f.name, getattr(self, f.name), Real, f"a number such as {f.default:g}")
        rules = [("guidance", math.isfinite(self.guidance), "a finite number; the paper has 7"),
                 ("k", 0 <= self.k < T, f"0 to {T - 1}; control is on for t > k"),
                 ("t_start", self.k < self.t_start, f"more than k, which is {self.k}"),
                 ("ip_scale", math.isfinite(self.ip_scale), "a finite number; 1 is the paper's"),
                 ("ref_rows", self.ref_rows in (1, 2), "1 or 2"),
                 ("diversity", 0 <= self.diversity <= 1, "0 to 1"),
                 ("init", self.init in INITS, " or ".join(INITS)),
                 ("mix", callable(self.mix) or self.mix in ("noise", "attention"), "noise or attention")]
        for name, fine, expected in rules:
            if not fine:
                raise Problem(f"{name} is {getattr(self, name)}, expected {expected}")
        if not callable(self.lam):
            self.lam_at(T, T)
        return replace(self, layers=counted("layers", self.layers, n_layers),
                       ip_layers=counted("ip_layers", self.ip_layers, n_layers))


def counted(name: str, layers: tuple[int, ...] | None, n: int | None) -> tuple[int, ...] | None:
    """Numbers of the UNet's n transformer blocks, all counted from the start. Raises Problem where it has fewer."""
    if layers is None or n is None:
        return layers
    if not isinstance(layers, Iterable) or not all(isinstance(each, int) and -n <= each < n for each in layers):
        raise Problem(f"{name} is {layers!r}, expected some of 0 to {n - 1}: this UNet has {n} of them")
    return tuple(layer % n for layer in layers)


@dataclass(frozen=True)
class Linear:
    """λ(t,T) from `first` at t = T to `last` at t = 0, in a straight line."""

    first: float
    last: float

    def __call__(self, t: int, T: int) -> float:
        return self.last + (self.first - self.last) * t / T


@dataclass(frozen=True)
class Cosine:
    """The same ends, along half a cosine: slow at both of them."""

    first: float
    last: float

    def __call__(self, t: int, T: int) -> float:
        return self.last + (self.first - self.last) * (1 - math.cos(math.pi * t / T)) / 2


ISADCA = Method()
Method.__doc__ = "\n\n".join([str(Method.__doc__), *(f"{f.name}: {f.metadata['about']}" for f in fields(Method))])

PRESETS = {method.name: method for method in [
    ISADCA,
    Method("quick", steps=10, source="isadca in ten steps: measured in examples/methods/README.md, on the demo alone"),
    Method("rival", lam=1.0, replace_above=601, adain_above=600, init="shuffle", t_start=961, ip_scale=0.0,
           source="RIVAL, arXiv 2305.18729; dvlab-research/RIVAL configs/rival_t2i.json, editing_early_steps 960"),
    Method("rival-edit", lam=1.0, replace_above=601, adain_above=600, init="inverted", t_start=901, ip_scale=0.0,
           source="RIVAL; dvlab-research/RIVAL configs/rival_editing.json, editing_early_steps 900"),
    Method("rival-variation", lam=1.0, guidance=5.0, replace_above=601, adain_above=600, init="shuffle", ref_rows=2,
           ip_scale=0.0, source="RIVAL; dvlab-research/RIVAL configs/rival_variation.json; invert with the prompt"),
    Method("ip-adapter", lam=0.0, guidance=7.5, init="random",
           source="IP-Adapter, arXiv 2308.06721; tencent-ailab/IP-Adapter ip_adapter.py, generate()"),
    Method("masactrl", lam=1.0, guidance=7.5, replace_above=-1, t_start=901, layers=tuple(range(-6, 0)), ip_scale=0.0,
           source="MasaCtrl, arXiv 2304.08465; TencentARC/MasaCtrl masactrl.py, start_step 4, start_layer 10 of 16"),
    Method("plain", lam=0.0, guidance=7.5, ip_scale=0.0, init="random",
           source="Stable Diffusion 1.5 text-to-image, DDIM"),
]}


@dataclass(frozen=True)
class Run:
    """One method, one prompt, one picture per seed. A prompt may be an embedding (M,D), as `Model.context` makes."""

    prompt: "str | Tensor"
    method: Method = ISADCA
    seeds: tuple[int, ...] = (0,)
    negative: "str | Tensor" = ""


def method_named(name: str) -> Method:
    """A preset. Raises Problem for an unknown name."""
    expect("method", name, str, "a Method or the name of a preset")
    if name not in PRESETS:
        raise Problem(f"method is {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
