"""The attention mix at the price of ISA: which kernel gives its normaliser, and what is done with it.

CUDA's kernels do not run here. They are asked for their shapes on meta tensors, and for their numbers by stand-ins:
the formula in float64, with the normaliser in the shape that each of them has.
"""

import logging
import math

import pytest
import torch
from attention_cases import CROSS, SELF, assert_is, at_both, drawn, normal
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from isadca.attention import attend, blend, isa
from isadca.speed import blend_isa as short_cut
from isadca.speed.blend_isa import FUSED, blend_isa, kernel_with_lse

ON_CUDA = pytest.mark.parametrize("fused", [value for (device, _), value in FUSED.items() if device == "cuda"],
                                  ids=lambda value: value[0].strip("_"))


def softmax_and_lse(q, k, v):
    """Attention and the normaliser of its softmax, as the formula has them."""
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def stand_in(name):
    """A kernel of CUDA by the formula, its normaliser in the shape that torch's kernel gives it."""
    def kernel(q, k, v, *options):
        assert options == dict(FUSED.values())[name]
        y, lse = softmax_and_lse(q, k, v)
        if "efficient" in name:  # rows beyond N hold anything
            lse = torch.cat([lse, torch.full((*lse.shape[:2], -lse.shape[2] % 32), math.nan)], dim=2)
        return y.to(q.dtype), lse[..., None] if "cudnn" in name else lse, None, None
    return kernel


# ---- the kernels -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [77, 1])
def test_the_cpus_kernel_gives_the_formulas_normaliser(dtype, m):
    q, k, v = normal(2, 3, 10, 8, dtype=dtype), normal(1, 3, m, 8, dtype=dtype), normal(1, 3, m, 8, dtype=dtype)
    k, v = k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)
    y, lse = kernel_with_lse(q, k, v)(q, k, v)
    expected, normaliser = softmax_and_lse(q, k, v)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.02)
    assert torch.equal(y, attend(q, k, v))
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), normaliser, atol=tolerance, rtol=tolerance)


@ON_CUDA
@pytest.mark.parametrize("n", [4096, 100, 64])
def test_cudas_kernels_are_called_as_this_torch_declares_them(monkeypatch, fused, n):
    """At SD1.5's sizes, on meta tensors: the call is accepted, the normaliser is one number a query in float32."""
    monkeypatch.setitem(FUSED, ("meta", SDPBackend.MATH), fused)
    q, k = (torch.empty(4, 8, tokens, 40, dtype=torch.float16, device="meta") for tokens in (n, 2 * n))
    y, lse = kernel_with_lse(q, k, k)(q, k, k)
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((4, 8, n), torch.float32)


@ON_CUDA
@pytest.mark.parametrize("extra_rows", [1, 2])
def test_the_blend_by_cudas_kernels_is_the_blend(monkeypatch, fused, extra_rows):
    monkeypatch.setitem(FUSED, ("cpu", SDPBackend.FLASH_ATTENTION), fused)
    monkeypatch.setattr(short_cut, "private", lambda module, name: stand_in(name) if module is torch.ops.aten
                        else getattr(module, name))
    q, k, v, *extra = drawn((33, 7, 8, 3), extra_rows)
    expected = blend(attend, isa(at_both(extra)), 0.3)(q, k, v, SELF)
    assert_is(blend_isa(at_both(extra), 0.3)(q, k, v, SELF), expected.numpy())


# ---- when ------------------------------------------------------------------------------------------------------

@pytest.fixture
def summed(monkeypatch):
    """How many keys each call of a kernel with its normaliser had."""
    seen = []

    def private(module, name):
        found = getattr(module, name)
        return found if module is torch else lambda q, k, v: seen.append(k.shape[2]) or found(q, k, v)
    monkeypatch.setattr(short_cut, "private", private)
    return seen


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_the_third_product_is_spared_unless_a_gradient_is_wanted(summed, wants_gradient):
    """The normaliser carries none."""
    q, k, v, *extra = drawn((5, 7, 4, 3))
    blend_isa(at_both(extra), 0.5)(q.requires_grad_(wants_gradient), k, v, SELF)
    assert summed == ([] if wants_gradient else [7, 3])


NO_BLENDS = [dict(lam=0.0), dict(lam=1.0), dict(mode="replace"), dict(kernel=lambda q, k, v, site: q)]


@pytest.mark.parametrize("changes", NO_BLENDS, ids=["lam 0", "lam 1", "replace", "own kernel"])
def test_what_is_no_blend_of_two_sides_asks_no_kernel(summed, changes):
    q, k, v, *extra = drawn((5, 7, 4, 3))
    blend_isa(at_both(extra), **{"lam": 0.5} | changes)(q, k, v, SELF)
    blend_isa(at_both(extra), 0.5)(q, k, v, CROSS)
    assert summed == []


def test_it_follows_torchs_own_choice_of_a_kernel(summed, monkeypatch):
    """Where torch has no fused kernel for a dtype, a head's size or a card, or the user forbids it, so do we."""
    q, k, v, *extra = drawn((5, 7, 4, 3))
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        y = blend_isa(at_both(extra), 0.5)(q, k, v, SELF)
    assert summed == []
    assert_is(y, blend(attend, isa(at_both(extra)), 0.5)(q, k, v, SELF).numpy())


def test_heads_that_attend_would_pad_are_left_to_it(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *x: SDPBackend.FLASH_ATTENTION.value)
    assert kernel_with_lse(*[torch.empty(1, 1, 4, 40)] * 3) is not None
    assert kernel_with_lse(*[torch.empty(1, 1, 4, 20)] * 3) is None


@pytest.mark.parametrize("missing", ["_fused_sdp_choice", "_scaled_dot_product_flash_attention_for_cpu"])
def test_without_torchs_private_names_both_sides_are_computed(monkeypatch, caplog, missing):
    caplog.set_level(logging.DEBUG, short_cut.__name__)
    private = short_cut.private.__wrapped__
    hidden = short_cut.cache(lambda module, name: private(module, "gone" if name == missing else name))
    monkeypatch.setattr(short_cut, "private", hidden)
    q, k, v, *extra = drawn((5, 7, 4, 3))
    expected = blend(attend, isa(at_both(extra)), 0.5)(q, k, v, SELF)
    for _ in range(3):
        assert torch.equal(blend_isa(at_both(extra), 0.5)(q, k, v, SELF), expected)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]  # once


@pytest.mark.parametrize("choice", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])  # torch counts these
def test_it_has_the_arithmetic_of_isa(monkeypatch, choice):
    """At SD1.5's finest level: two products of N × N keys, where the blend of two sides has three."""
    q, k, *extra = (torch.empty(2, 8, 4096, 40, dtype=torch.float16, device="meta") for _ in range(4))

    def count(f):
        with FlopCounterMode(display=False) as counter:
            f(q, k, k, SELF)
        return counter.get_total_flops()
    sides, alone = count(blend(attend, isa(at_both(extra)), 0.5)), count(isa(at_both(extra)))
    monkeypatch.setitem(FUSED, ("meta", SDPBackend.MATH), FUSED["cuda", choice])
    assert count(blend_isa(at_both(extra), 0.5)) == alone == sides * 2 / 3
