"""Our method in its naive form, every branch and the reference as rows of one batch, against the sampling loop.

The naive form is a plain loop on diffusers' UNet and scheduler with attention written out here; nothing is cached and
nothing replayed. In float64, so that the two agree to rounding.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import theirs as diffusers_side
import torch
from theirs import Theirs, noise_alignment, softmax_attention
from torch import Tensor
from torch.testing import assert_close

import isadca
from isadca import Linear, Method, Run
from isadca.reference import initial_latents

PROMPT, NEGATIVE, STEPS, SIZE = "a lemon", "stripes, flat", 10, (32, 16)
PAPER = Method(lam=0.7)
EVERYTHING = Method(lam=Linear(1.0, 0.2), guidance=4.0, k=150, t_start=850, replace_above=600, adain_above=700,
                    ip_scale=0.6, diversity=0.3)
LAYERS = Method(lam=0.5, layers=(1, 2, 5), init="shuffle")
RIVAL_VARIATION = isadca.PRESETS["rival-variation"]  # each guidance half reads a reference prompted as it is


@pytest.fixture(scope="module")
def theirs():
    return diffusers_side.load(torch.float64)


@pytest.fixture(scope="module")
def ip_kv(theirs, cat):
    return theirs.ip_keys_values(cat)  # as it was before it was fitted


@pytest.fixture(scope="module")
def ref(demo64, cat):
    return isadca.invert(demo64, cat, STEPS, prompt="a cat", size=SIZE)


# ---- the naive form --------------------------------------------------------------------------------------------

class Layout(NamedTuple):
    """Which rows of the batch are what."""

    branches: int                     # copies of z_t in each guidance half; the reference's row comes before them
    isa: tuple[tuple[int, int], ...]  # rows with ISA, each with the row of its reference
    image: tuple[int, int]            # rows that see the image prompt, unconditional first
    inside: bool                      # whether λ mixes inside the blocks


SIX = Layout(2, isa=((1, 0), (4, 3)), image=(2, 5), inside=False)  # [ref_u, isa_u, dca_u, ref_c, isa_c, dca_c]
FOUR = Layout(1, isa=((1, 0), (3, 2)), image=(1, 3), inside=True)  # [ref_u, z_u, ref_c, z_c]


def lam_at(method: Method, t: int) -> float:
    if isinstance(method.lam, Linear):
        return method.lam.first * t / 1000 + method.lam.last * (1 - t / 1000)
    return method.lam


def self_rule(method: Method, layout: Layout, layer: int):
    def rule(q, k, v, t):
        y = softmax_attention(q, k, v)
        if not method.k < t <= method.t_start or layer not in (method.layers or range(99)):
            return y
        lam = lam_at(method, t) if layout.inside else 1
        for row, ref in layout.isa:
            keys, values = k[ref], v[ref]
            if t <= method.replace_above:
                keys, values = torch.cat([keys, k[row]], dim=1), torch.cat([values, v[row]], dim=1)
            y[row] = (1 - lam) * y[row] + lam * softmax_attention(q[row], keys, values)
        return y
    return rule


def cross_rule(method: Method, layout: Layout, k_ip: Tensor, v_ip: Tensor):
    def rule(q, k, v, t):
        y = softmax_attention(q, k, v)
        if method.k < t <= method.t_start:
            scale = method.ip_scale * ((1 - lam_at(method, t)) if layout.inside else 1)
            for half, row in enumerate(layout.image):
                y[row] = y[row] + scale * softmax_attention(q[row], k_ip[half], v_ip[half])
        return y
    return rule


def guided(method: Method, t: int, u: list[Tensor], c: list[Tensor]) -> Tensor:
    """The noise that the step uses, from that of the rows of each half: guidance, RIVAL's alignment, Eq. 9."""
    branches = [eps_u + method.guidance * (eps_c - eps_u) for eps_u, eps_c in zip(u[1:], c[1:])]
    eps_isa, eps_dca = branches[0], branches[-1]
    if t > method.adain_above:
        eps_isa = noise_alignment(eps_isa, c[0])
    lam = lam_at(method, t)
    return lam * eps_isa + (1 - lam) * eps_dca


def naive(theirs: Theirs, layout: Layout, method: Method, ip_kv: dict, ref, z: Tensor) -> Tensor:
    order = diffusers_side.execution_order(theirs.unet)
    diffusers_side.install(theirs.unet, lambda name: self_rule(method, layout, order.index(name)) if name in order
                           else cross_rule(method, layout, *ip_kv[name]))
    n = layout.branches
    first = "" if method.ref_rows == 2 else ref.prompt
    context = theirs.context(first, *[NEGATIVE] * n, ref.prompt, *[PROMPT] * n)
    scheduler = theirs.scheduler(steps=ref.steps)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        half = [ref.chain[-1 - i][None]] + [z] * n
        eps = theirs.unet(torch.cat(half * 2), t, context, cross_attention_kwargs={"t": t}).sample.split(1)
        z = scheduler.step(guided(method, t, eps[:n + 1], eps[n + 1:]), t, z).prev_sample
    return z


# ---- the tests -------------------------------------------------------------------------------------------------

MIXES = pytest.mark.parametrize("mix, layout", [("noise", SIX), ("attention", FOUR)], ids=["noise", "attention"])


@MIXES
@pytest.mark.parametrize("method, seeds", [(EVERYTHING, (3, 4)), (LAYERS, (5,)), (RIVAL_VARIATION, (6,))],
                         ids=["everything", "layers", "rival-variation"])
def test_the_loop_is_the_naive_form(demo64, theirs, ip_kv, ref, method, seeds, mix, layout):
    run = Run(PROMPT, replace(method, mix=mix), seeds, NEGATIVE)
    starts = initial_latents(ref, run.method, run.seeds).split(1)
    expected = torch.cat([naive(theirs, layout, method, ip_kv, ref, z) for z in starts])
    [ours] = isadca.sample(demo64, ref, [run])
    assert_close(ours, expected, atol=1e-10, rtol=0)


@MIXES
def test_replay_in_any_chunks_is_reference_rows_in_the_batch(demo64, theirs, ip_kv, ref, mix, layout):
    """Reference keys depend on (z̄_t, t) alone: live rows, five steps at a time, or all at once."""
    expected = naive(theirs, layout, PAPER, ip_kv, ref, ref.chain[-1:])
    for at_once in (1, 5, STEPS):
        [ours] = isadca.sample(demo64, ref, [Run(PROMPT, replace(PAPER, mix=mix), negative=NEGATIVE)],
                               at_once=at_once)
        assert_close(ours, expected, atol=1e-10, rtol=0)
