"""RIVAL and MasaCtrl as their own code runs them, reference rows inside the batch, against our presets.

The oracles are plain loops on diffusers' UNet, VAE and scheduler, written from dvlab-research/RIVAL (a879c0e) and
TencentARC/MasaCtrl (d0ba16b); in float64, so that two ways of computing the same thing agree to rounding.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import theirs as diffusers_side
import torch
from theirs import Theirs, noise_alignment, softmax_attention
from torch import Tensor
from torch.testing import assert_close

import isadca
from isadca import PRESETS, Run
from isadca.reference import initial_latents
from isadca.networks.sizes import UNetConfig
from isadca.networks.unet import UNet

PROMPT, NEGATIVE = "a lemon", "stripes, flat"
RIVAL_T2I, RIVAL_EDITING = dict(shuffled=True, early=960), dict(shuffled=False, early=900)


@pytest.fixture(scope="module")
def theirs():
    return diffusers_side.load(torch.float64)


@pytest.fixture(scope="module")
def invert(demo64, cat):
    return cache(lambda steps, size: isadca.invert(demo64, cat, steps, size=size))


# ---- the oracles -----------------------------------------------------------------------------------------------

def rival_rule(early: int, t_align: int = 600):
    """Self-attention of the rows [ref_u, gen_u, ref_c, gen_c]: each takes the reference's keys of its half."""
    def rule(q, k, v, t):
        if t - 1 > early:
            return softmax_attention(q, k, v)
        k_ref, v_ref = k[[0, 0, 2, 2]], v[[0, 0, 2, 2]]
        if t - 1 > t_align:
            return softmax_attention(q, k_ref, v_ref)
        return softmax_attention(q, torch.cat([k_ref, k], dim=2), torch.cat([v_ref, v], dim=2))
    return rule


def masactrl_rule(index: int, first_layer: int, start: int):
    """The target's queries meet the source's keys and values alone, in the layers and steps of the edit."""
    def rule(q, k, v, t):
        if index >= first_layer and t <= start:
            k, v = k[[0, 0, 2, 2]], v[[0, 0, 2, 2]]
        return softmax_attention(q, k, v)
    return rule


def in_batch(theirs: Theirs, chain: Tensor, z: Tensor, guidance: float, t_early: int = 1000):
    """The loop both codes share: four rows a step, the reference re-read from the chain. Yields (t, z_t, guided
    noise), then (None, z_0, None)."""
    scheduler = theirs.scheduler(steps=len(chain) - 1)
    context = theirs.context("", NEGATIVE, "", PROMPT)
    ref = chain[-1:]
    for i, t in enumerate(scheduler.timesteps.tolist()):
        eps = theirs.unet(torch.cat([ref, z, ref, z]), t, context, cross_attention_kwargs={"t": t}).sample
        _, eps_u, eps_ref, eps_c = eps.split(1)
        guided = eps_u + guidance * (eps_c - eps_u)
        if t > t_early:
            guided = noise_alignment(guided, eps_ref)
        yield t, z, guided
        z = scheduler.step(guided, t, z).prev_sample
        ref = chain[-2 - i][None]
    yield None, z, None


def assert_same_path(model, theirs, ref, run, oracle, seed: int = 0) -> None:
    """Latents and guided noise at every step, z_0 and the picture."""
    seen = []
    [z_0] = isadca.sample(model, ref, [run], on_step=lambda run, t, z, noise: seen.append((t, z, noise.mixed)))
    *steps, (_, expected, _) = oracle
    assert [t for t, _, _ in seen] == [t for t, _, _ in steps] and len(seen) == ref.steps
    for ours, theirs_at_t in zip(seen, steps):
        assert_close(ours[1:], theirs_at_t[1:], atol=1e-10, rtol=0, msg=lambda text: f"at t = {ours[0]}: {text}")
    assert_close(z_0, expected, atol=1e-10, rtol=0)
    assert np.abs(np.asarray(isadca.decode(model, z_0)[0], int) - theirs.decode(expected)).max() <= 1


# ---- the tests -------------------------------------------------------------------------------------------------

# 50 steps are RIVAL's own, 30 do not divide 1000, 20 have t = 901 and 601, as 50 have
@pytest.mark.parametrize("preset, steps, size, settings", [
    ("rival", 50, 16, RIVAL_T2I), ("rival", 30, 16, RIVAL_T2I), ("rival-edit", 20, 32, RIVAL_EDITING)])
def test_rival_presets_take_rivals_path(demo64, theirs, invert, preset, steps, size, settings):
    ref, run = invert(steps, size), Run(PROMPT, PRESETS[preset], seeds=(3,), negative=NEGATIVE)
    z = initial_latents(ref, run.method, run.seeds)
    assert torch.equal(z, ref.chain[-1:]) != settings["shuffled"]
    diffusers_side.install(theirs.unet, lambda name: rival_rule(settings["early"]) if name.endswith("attn1")
                           else diffusers_side.plain)
    oracle = in_batch(theirs, ref.chain, z, guidance=7, t_early=600)
    assert_same_path(demo64, theirs, ref, run, oracle)


def test_shuffled_start_moves_whole_cells(invert):
    """RIVAL permutes positions, the same way in all channels: as a set, the cells' vectors stay what they were."""
    ref = invert(7, 16)
    z = initial_latents(ref, PRESETS["rival"], (0, 1))
    cells = [sorted(map(tuple, row.flatten(1).T.tolist())) for row in (*z, ref.chain[-1])]
    assert cells[0] == cells[1] == cells[2] and not torch.equal(z[0], z[1])


def test_a_second_picture_starts_in_the_first_phase(demo64, invert):
    """A step counter inside the layers is out of phase for the second picture where steps do not divide 1000."""
    ref, run = invert(7, 16), Run(PROMPT, PRESETS["rival"])
    first, [second] = isadca.sample(demo64, ref, [run, run]), isadca.sample(demo64, ref, [run])
    assert torch.equal(first[0], second) and torch.equal(first[1], second)


def test_masactrl_preset_takes_masactrls_path(demo64, theirs, invert):
    """Replacement in the last layers of the way up, from the fifth of 50 steps on; the stored latents are fed."""
    ref = invert(12, 16)
    order = diffusers_side.execution_order(theirs.unet)
    layers = range(len(order))[-3:]
    run = Run(PROMPT, replace(PRESETS["masactrl"], layers=tuple(layers)), negative=NEGATIVE)
    diffusers_side.install(theirs.unet, lambda name: masactrl_rule(order.index(name), layers[0], start=901)
                           if name.endswith("attn1") else diffusers_side.plain)
    assert_same_path(demo64, theirs, ref, run, in_batch(theirs, ref.chain, ref.chain[-1:], guidance=7.5))


def test_layers_count_in_execution_order(demo64, theirs):
    ours = [site.name for site in demo64.unet.sites if site.kind == "self"]
    assert ours == diffusers_side.execution_order(theirs.unet)


def test_masactrl_layers_are_the_fine_half_of_the_way_up():
    """MasaCtrl's start_layer 10 in Stable Diffusion 1.5: the 32² and 64² levels of the decoder, start_step 4."""
    with torch.device("meta"):
        sites = [site for site in UNet(UNetConfig()).sites if site.kind == "self"]
    method = PRESETS["masactrl"].check(1000, len(sites))
    chosen = [site.name[: len("up_blocks.2.attentions.0")] for site in sites if site.layer in method.layers]
    assert len(sites) == 16 and chosen == [f"up_blocks.{i}.attentions.{j}" for i in (2, 3) for j in range(3)]
    assert [t for t in range(981, 0, -20) if not method.is_active(t)] == [981, 961, 941, 921]
