"""`isadca.record`: its maps are the softmax of what the kernel was given, and it leaves the run as it was.

The hand-made case has one query and two keys of width 1: softmax(1 · [0, ln 3]) = [1/4, 3/4].
"""

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

import isadca
from isadca.attention import Site
from isadca.loop import Guided, Run, sample

SITE = Site("up_blocks.0.attentions.0.transformer_blocks.0.attn1", "self", "up", 3, (1, 1))
TEXT, IMAGE = 12, 4  # tokens of the tiny model's two prompts


def run(model, ref, method, seeds=(0,)):
    [z] = sample(model, ref, [Run("a lemon", method, seeds)])
    return z


def numpy_probs(q, k):
    """Mean over heads of one row, (H,N,d) and (H,M,d) -> (N,M)."""
    scores = np.exp(q.numpy() @ k.numpy().transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
    return (scores / scores.sum(-1, keepdims=True)).mean(0)


# ---- one call --------------------------------------------------------------------------------------------------

def test_a_map_worked_out_by_hand():
    q, k, v = torch.tensor([1.0]), torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 2.0])
    q, k, v = (x.view(1, 1, -1, 1) for x in (q, k, v))
    recorder = isadca.record()
    y = recorder.kernel(700)(q, k, v, SITE)
    [(site, t, branch, probs)] = recorder.maps
    assert (site, t, branch) == (SITE, 700, 0)
    torch.testing.assert_close(probs, torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(y.flatten(), torch.tensor([1.75]))


def test_the_mean_over_heads_of_the_chosen_row():
    q, k, v = (torch.randn(3, 2, n, 5, dtype=torch.float64) for n in (4, 6, 6))
    for row in (-1, 0, 1):
        recorder = isadca.record(row=row)
        y = recorder.kernel(1)(q, k, v, SITE)
        np.testing.assert_allclose(recorder.maps[0].probs, numpy_probs(q[row], k[row]), atol=1e-12)
        np.testing.assert_allclose(y, oracle.attention(q.numpy(), k.numpy(), v.numpy()), atol=1e-12)


@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_half_precision_is_widened(dtype, kept):
    q, k, v = torch.randn(3, 1, 2, 4, 5, dtype=dtype)
    recorder = isadca.record()
    recorder.kernel(1)(q, k, v, SITE)
    assert recorder.maps[0].probs.dtype == kept


def test_gradients_pass_through_a_map():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 4, 5))
    recorder = isadca.record()
    recorder.kernel(1)(q, k, v, SITE)
    recorder.maps[0].probs[0, 0].backward()
    assert q.grad.abs().sum() > 0 and k.grad.abs().sum() > 0


# ---- a run -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [isadca.Method(), isadca.Method(mix="attention"), isadca.Method(lam=1.0),
                                    isadca.Method(k=300, t_start=800, layers=(-1,), ip_layers=(0,)),
                                    isadca.PRESETS["rival"]], ids=["noise", "attention", "isa", "window", "rival"])
def test_the_picture_stays_the_same(tiny, tiny_ref, method):
    recorder = isadca.record(method)
    torch.testing.assert_close(run(tiny, tiny_ref, recorder.method), run(tiny, tiny_ref, method))
    assert recorder.maps


def test_each_map_is_the_softmax_of_what_the_kernel_was_given(tiny, tiny_ref):
    """All calls of a run, in their order, against a kernel that keeps queries and keys."""
    given = []

    def kernel(q, k, v, site):
        given.append((site, numpy_probs(q[-1], k[-1])))
        return isadca.attend(q, k, v, site)
    recorder = isadca.record(isadca.Method(lam=0.6))
    replayed = list(isadca.replay(tiny, tiny_ref))
    sample(tiny, tiny_ref, [Run("a lemon", recorder.method)], replayed=replayed, kernel=kernel)
    assert [site for site, _ in given] == [m.site for m in recorder.maps]
    assert [m.t for m in recorder.maps] == sorted((m.t for m in recorder.maps), reverse=True)
    for (_, expected), kept in zip(given, recorder.maps):
        np.testing.assert_allclose(kept.probs, expected, atol=1e-10)


def test_branches_are_told_apart(tiny, tiny_ref):
    """ISA's keys are the reference's and its own, its cross-attention is the text's; DCA's reads the image, too."""
    recorder = isadca.record()
    run(tiny, tiny_ref, recorder.method)
    seen = {(m.branch, m.site.kind, m.probs.shape[1] / (len(m.probs) if m.site.kind == "self" else 1))
            for m in recorder.maps}
    assert seen == {(0, "self", 2), (0, "cross", TEXT), (1, "self", 1), (1, "cross", TEXT), (1, "cross", IMAGE)}
    assert {m.site.name for m in recorder.maps} == {site.name for site in tiny.unet.sites}
    assert {m.t for m in recorder.maps} == {step.t for step in tiny.schedule.steps(6)}


def test_only_what_is_wanted(tiny, tiny_ref):
    recorder = isadca.record(isadca.Method(), lambda site, t, branch: site.layer == 2 and t > 500 and branch == 1)
    run(tiny, tiny_ref, recorder.method)
    assert {(m.site.layer, m.branch) for m in recorder.maps} == {(2, 1)}
    assert {m.t for m in recorder.maps} == {step.t for step in tiny.schedule.steps(6) if step.t > 500}


def test_steps_without_control_are_recorded_as_they_are(tiny, tiny_ref):
    recorder = isadca.record(isadca.Method(lam=1.0, k=500), lambda site, t, branch: site.kind == "self")
    run(tiny, tiny_ref, recorder.method)
    for m in recorder.maps:
        assert m.probs.shape[1] == (2 if m.t > 500 else 1) * len(m.probs)


def test_rows_of_guidance_have_numbers(tiny, tiny_ref):
    def mix(controls):
        half = controls.conditions.text_kv[-1]
        flat = lambda q, k, v, site: controls.kernel(torch.zeros_like(q), k, v, site)
        return [Guided(half, flat, 0.0), Guided(half, controls.kernel, 2.0)]
    method = isadca.Method(mix=mix)
    recorder = isadca.record(method)
    torch.testing.assert_close(run(tiny, tiny_ref, recorder.method), run(tiny, tiny_ref, method))
    flat = {m.branch for m in recorder.maps if torch.allclose(m.probs, m.probs[:, :1])}
    assert flat == {0} and {m.branch for m in recorder.maps} == {0, 1}


def test_the_last_row_is_the_last_variation_in_the_text_half(tiny, tiny_ref):
    method = isadca.Method(init="random")
    both, alone = isadca.record(method), isadca.record(method)
    run(tiny, tiny_ref, both.method, seeds=(0, 1))
    run(tiny, tiny_ref, alone.method, seeds=(1,))
    for ours, theirs in zip(both.maps, alone.maps, strict=True):
        torch.testing.assert_close(ours.probs, theirs.probs)


def test_a_method_keeps_its_fields(tiny, tiny_ref):
    """Layers counted from the end, and the name in a recipe."""
    method = isadca.Method("mine", lam=1.0, layers=(-1,))
    recorder = isadca.record(method)
    run(tiny, tiny_ref, recorder.method)
    assert replace(recorder.method, mix="noise") == method
    read = {m.site.layer for m in recorder.maps if m.site.kind == "self" and m.probs.shape[1] == 2 * len(m.probs)}
    assert read == {len(tiny.unet.sites) // 2 - 1}
