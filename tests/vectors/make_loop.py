"""Inversion and Algorithm 1 as the vectors are made, and the ways to do them wrong.

The UNet is diffusers', its attention replaced by the equations written out; each branch is a call of its own, and so
is each variation.
"""

from dataclasses import dataclass

import numpy as np
import torch

from make_ddim import grid, level_at, move
from make_networks import adapted_unet


@dataclass(frozen=True)
class Settings:
    """The knobs of Algorithm 1; README.md says what each means."""

    lam: object = 0.7
    mix: str = "noise"
    guidance: float = 7.0
    k: int = 0
    t_start: int = 1000
    replace_above: int = 1000
    adain_above: int = 1000
    layers: tuple | None = None
    ref_rows: int = 1
    ip_scale: float = 1.0


@dataclass(frozen=True)
class Mistakes:
    """What may be done wrong on the way; each is named where it is used."""

    late: int = 0                # the reference is that many steps behind
    inverting: bool = False      # its keys are those of the inversion pass
    conditional_only: bool = False
    align_after: bool = False
    swapped_lambda: bool = False
    no_reference: bool = False
    phase_shift: int = 0         # thresholds see another step's t


class Model:
    """The tiny UNet with attention by rule, and the reference's chain and what is seen of it."""

    def __init__(self):
        self.unet, self.project = adapted_unet("base")
        names = [n.removesuffix(".processor") for n in self.unet.attn_processors]
        pairs = {n: self.unet.attn_processors[f"{n}.processor"] for n in names}
        self.image = {n: (p.to_k_ip[0], p.to_v_ip[0]) for n, p in pairs.items() if ".attn2" in n}
        self.rule = None
        self.unet.encoder_hid_proj, self.unet.config.encoder_hid_dim_type = None, None
        self.unet.set_attn_processor({f"{n}.processor": Processor(self, n) for n in names})
        place = {"down": 0, "mid": 1, "up": 2}
        order = sorted((n for n in names if ".attn1" in n), key=lambda n: place[n.split("_")[0]])
        self.layer = {n: i for i, n in enumerate(order)}  # in the order of execution
        self.seen = {}

    def noise(self, z, t, context, rule):
        self.rule = rule
        return self.unet(torch.from_numpy(z), t, torch.from_numpy(context)).sample.numpy()

    def see(self, chain, at, t, given, rows):
        """Keys and values of every self-attention in a plain pass over one latent of the chain, and the noise. With
        two rows, the first is prompted with the empty text; the noise is that of the last."""
        key = len(chain), at, t, rows
        if key not in self.seen:
            z, context = chain[at: at + 1], np.concatenate([given["empty"], given["source"]][-rows:])
            kv = {}

            def capture(name, q, k, v):
                kv[name] = (k, v)
                return attend(q, k, v)
            eps = self.noise(np.repeat(z, rows, 0), t, context, capture)
            self.seen[key] = kv, eps[-1:]
        return self.seen[key]


class Processor:
    def __init__(self, model, name):
        self.model, self.name = model, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (split(x, attn.heads) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        y = self.model.rule(self.name, q, k, v)
        return attn.to_out[0](y.transpose(1, 2).flatten(2))


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


# ---- the method ------------------------------------------------------------------------------------------------

def invert(model, z0, context, steps, label="upper"):
    """z_0 ... z_T. The label t of a stride is its upper end's; the textbook's is its lower end's."""
    chain = [z0]
    for t, below in grid(steps, 1)[::-1]:
        told = t if label == "upper" else max(below, 0)
        eps = model.noise(chain[-1], told, context, lambda _, q, k, v: attend(q, k, v))
        chain.append(move(chain[-1], eps, level_at(below), level_at(t)))
    return np.concatenate(chain)


def lambda_at(lam, t):
    if isinstance(lam, dict):
        kind, (first, last) = next(iter(lam.items()))
        share = t / 1000 if kind == "linear" else (1 - np.cos(np.pi * t / 1000)) / 2
        return last + (first - last) * share
    return lam


def self_rule(model, kv, settings, t, weight, halves):
    """ISA in the layers that are asked for, `weight` of it, plain attention for the rest."""
    layers = None if settings.layers is None else {i % len(model.layer) for i in settings.layers}

    def rule(name, q, k, v):
        own = attend(q, k, v)
        if kv is None or (layers is not None and model.layer[name] not in layers):
            return own
        K, V = (x.expand(len(q), -1, -1, -1) for x in kv[name])
        if t <= settings.replace_above:
            K, V = torch.cat([K, k], 2), torch.cat([V, v], 2)
        mixed = weight * attend(q, K, V) + (1 - weight) * own
        return mixed if halves == "both" else torch.cat([own[:1], mixed[1:]])
    return rule


def cross_rule(model, tokens, scale):
    def rule(name, q, k, v):
        text = attend(q, k, v)
        if tokens is None or scale == 0:
            return text
        K, V = (split(project(tokens), q.shape[1]) for project in model.image[name])
        return text + scale * attend(q, K, V)
    return rule


def by_kind(on_self, on_cross):
    return lambda name, q, k, v: (on_self if ".attn1" in name else on_cross)(name, q, k, v)


def guided(model, z, t, given, settings, rule):
    context = given["context"] if settings.guidance != 1 else given["context"][1:]
    eps = model.noise(np.repeat(z, len(context), 0), t, context, rule)
    return eps if len(eps) == 1 else eps[:1] + settings.guidance * (eps[1:] - eps[:1])


def align(x, ref):
    """RIVAL's alignment of the noise: mean and deviation of each channel."""
    std, ref_std = (np.sqrt(y.var((2, 3), ddof=1, keepdims=True) + 1e-5) for y in (x, ref))
    return (x - x.mean((2, 3), keepdims=True)) / std * ref_std + ref.mean((2, 3), keepdims=True)


def predict(model, z, t, kv, ref_eps, given, settings, wrong):
    """The noise of the ISA branch, of the DCA branch, and their mix."""
    lam, phase = lambda_at(settings.lam, t), t + wrong.phase_shift
    lam = 1 - lam if wrong.swapped_lambda else lam
    tokens = None if settings.ip_scale == 0 else torch.from_numpy(given["tokens"][-1 if settings.guidance == 1 else 0:])
    plain_self, plain_cross = self_rule(model, None, settings, t, 0, ""), cross_rule(model, None, 0)
    halves = "conditional" if wrong.conditional_only else "both"
    if not settings.k < t <= settings.t_start:
        isa = dca = guided(model, z, t, given, settings, by_kind(plain_self, plain_cross))
    elif settings.mix == "attention":
        rule = by_kind(self_rule(model, kv, settings, phase, lam, halves),
                       cross_rule(model, tokens, (1 - lam) * settings.ip_scale))
        isa = dca = guided(model, z, t, given, settings, rule)
    else:
        isa_rule = by_kind(self_rule(model, kv, settings, phase, 1, halves), plain_cross)
        dca_rule = by_kind(plain_self, cross_rule(model, tokens, settings.ip_scale))
        isa = guided(model, z, t, given, settings, isa_rule if lam > 0 else dca_rule)  # a branch of weight 0 is not run
        dca = guided(model, z, t, given, settings, dca_rule) if 0 < lam < 1 else isa
    if t > settings.adain_above and not wrong.align_after:
        isa = align(isa, ref_eps)
    mixed = lam * isa + (1 - lam) * dca
    return align(mixed, ref_eps) if t > settings.adain_above and wrong.align_after else mixed


def denoise(model, chain, given, settings, z, wrong=Mistakes()):
    """Algorithm 1 for one variation: z_T ... z_0, (steps + 1,4,h,w)."""
    steps, path = len(chain) - 1, [z]
    for i, (t, below) in enumerate(grid(steps, 1)):
        at = min(steps - i + wrong.late, steps)
        kv, ref_eps = model.see(chain, at, t, given, settings.ref_rows)
        if wrong.inverting:
            kv, _ = model.see(chain, at - 1, t, given, settings.ref_rows)
        kv = None if wrong.no_reference else kv
        eps = predict(model, path[-1], t, kv, ref_eps, given, settings, wrong)
        path.append(move(path[-1], eps, level_at(t), level_at(below)))
    return np.stack(path)[:, 0]


def counted_phases(model, chain, given, settings, z):
    """A second picture under RIVAL's counter: it starts at 1000 and loses a stride at each call, but is set back to
    1000 only at 0 or below, which a grid of 6 steps does not reach. The second picture's first step sees the rest."""
    steps, path = len(chain) - 1, [z]
    stride = 1000 // steps
    counter = 1000 - stride * steps
    for i, (t, below) in enumerate(grid(steps, 1)):
        counter -= stride
        kv, ref_eps = model.see(chain, steps - i, t, given, settings.ref_rows)
        eps = predict(model, path[-1], t, kv, ref_eps, given, settings, Mistakes(phase_shift=counter + 1 - t))
        path.append(move(path[-1], eps, level_at(t), level_at(below)))
        counter = 1000 if counter <= 0 else counter
    return np.stack(path)[:, 0]
