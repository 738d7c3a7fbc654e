"""Three ways to one number: the formulas (oracle.py), the written-out kernel and the fused one, for every variant."""

import numpy as np
import oracle
import pytest
import torch
from attention_cases import (
    CROSS,
    EACH_VARIANT,
    EXTRA_ROWS,
    KERNELS,
    ROWS,
    SELF,
    SIZES,
    TOLERANCE,
    assert_is,
    at_both,
    drawn,
    in_numpy,
    normal,
)
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck

from isadca.attention import attend, attend_reference, attention_probs, blend, by_kind, capture, dca, isa
from isadca.networks.layers import Attention
from isadca.speed.blend_isa import blend_isa

# ---- kernels -----------------------------------------------------------------------------------------------

@KERNELS
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_is_the_formula(kernel, size, causal):
    """Causal with N != M, too: query n sees the keys 0 to n, counted from the first."""
    q, k, v, *_ = drawn(size)
    assert_is(kernel(q, k, v, causal=causal), oracle.attention(*in_numpy([q, k, v]), causal=causal))


@KERNELS
@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), sizes=st.tuples(*[st.integers(1, 9)] * 6), scale=st.floats(0, 20),
       causal=st.booleans())
def test_kernel_is_the_formula_at_any_size_and_sharpness(kernel, seed, sizes, scale, causal):
    """From uniform (scale 0) to one-hot weights; values may have another width than keys."""
    torch.manual_seed(seed)
    b, h, n, m, d, d_v = sizes
    q, k, v = normal(b, h, n, d, scale=scale), normal(b, h, m, d), normal(b, h, m, d_v)
    assert_is(kernel(q, k, v, causal=causal), oracle.attention(*in_numpy([q, k, v]), causal=causal))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_probabilities_sum_to_one(dtype, causal):
    q, k = normal(2, 2, 6, 40, dtype=dtype), normal(2, 2, 77, 40, dtype=dtype)
    probs = attention_probs(q, k, causal)
    assert probs.dtype == dtype and probs.min() >= 0
    assert_is(probs.double().sum(-1), np.ones((2, 2, 6)), TOLERANCE[dtype])
    assert causal == (probs.triu(1).count_nonzero() == 0)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_logits_stay_finite_in_half_precision(kernel, dtype):
    """q·k beyond fp16's 65504: the sum must be taken in wider numbers, or inf - inf is nan."""
    q, k, v = normal(1, 2, 5, 160, dtype=dtype), normal(1, 2, 7, 160, dtype=dtype), normal(1, 2, 7, 160, dtype=dtype)
    q, k = 60 * (1 + q.abs()), 60 * (1 + k.abs())
    assert q.double().mul(q.double()).sum(-1).min() > 2 * torch.finfo(torch.float16).max
    assert_is(kernel(q, k, v), oracle.attention(*in_numpy([q, k, v])), TOLERANCE[dtype])


# ---- variants ----------------------------------------------------------------------------------------------

@EACH_VARIANT
@EXTRA_ROWS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_variant_is_its_formula(variant, size, extra_rows):
    q, k, v, *extra = drawn(size, extra_rows)
    expected = variant.formula(*in_numpy([q, k, v, *extra]))
    for kernel in (attend_reference, attend):
        assert_is(variant.build(extra, kernel)(q, k, v, variant.site), expected)


@EACH_VARIANT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(16, 16, 40, 16), (6, 77, 160, 4)], ids=str)
def test_variant_in_other_precisions(variant, size, dtype):
    """The formula is evaluated in float64 on the rounded inputs. The result stays in the inputs' dtype."""
    q, k, v, *extra = drawn(size, 2, dtype)
    expected = variant.formula(*in_numpy([q, k, v, *extra]))
    for kernel in (attend_reference, attend):
        y = variant.build(extra, kernel)(q, k, v, variant.site)
        assert y.dtype == dtype
        assert_is(y, expected, TOLERANCE[dtype])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), lam=st.floats(0, 1), scale=st.floats(-2, 2), halves=st.integers(1, 3),
       n=st.integers(1, 4), mode=st.sampled_from(["append", "replace"]))
def test_all_variants_together(seed, lam, scale, halves, n, mode):
    """(1-λ)·plain + λ·ISA in self-attention, text + scale·image in cross-attention, for any λ, scale and row count."""
    torch.manual_seed(seed)
    q, k, v = (normal(halves * n, 2, tokens, 6) for tokens in (5, 7, 7))
    extra = [normal(halves, 2, 3, 6) for _ in range(2)]
    both = by_kind(blend(attend, isa(at_both(extra), mode), lam), dca(at_both(extra), scale))
    arrays = in_numpy([q, k, v, *extra])
    on_self = oracle.blend(oracle.attention(*arrays[:3]), oracle.isa(*arrays, mode=mode), lam)
    assert_is(both(q, k, v, SELF), on_self)
    assert_is(both(q, k, v, CROSS), oracle.dca(*arrays, scale=scale))
    assert_is(blend_isa(at_both(extra), lam, mode)(q, k, v, SELF), on_self)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), lam=st.floats(0.01, 0.99), sharpness=st.floats(0, 20))
def test_blend_isa_is_the_blend_at_any_sharpness(seed, lam, sharpness):
    """Where one side's weights vanish beside the other's, too."""
    torch.manual_seed(seed)
    q, k, v, *extra = drawn((5, 7, 4, 3))
    expected = blend(attend, isa(at_both(extra)), lam)(sharpness * q, k, v, SELF)
    assert_is(blend_isa(at_both(extra), lam)(sharpness * q, k, v, SELF), expected.numpy())


@EACH_VARIANT
@KERNELS
@pytest.mark.parametrize("extra_rows", [1, 2])
def test_gradients(variant, kernel, extra_rows):
    """With respect to q, k, v and the extra keys and values, against finite differences along random directions."""
    inputs = [x.requires_grad_() for x in drawn((3, 2, 2, 2), extra_rows)]
    assert gradcheck(lambda q, k, v, *extra: variant.build(extra, kernel)(q, k, v, variant.site), inputs,
                     fast_mode=True)


@KERNELS
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_gradients_of_the_kernels(kernel, causal):
    """The whole Jacobian."""
    inputs = [x[:1].requires_grad_() for x in drawn((3, 4, 2, 1), heads=1)[:3]]
    assert gradcheck(lambda q, k, v: kernel(q, k, v, causal=causal), inputs)


# ---- from hidden states, as the paper has it -----------------------------------------------------------------

def layer_of(width: int, heads: int, context_dim: int | None = None):
    """An attention layer without its output projection, and W_Q, W_K, W_V in NumPy."""
    layer = Attention(width, heads, context_dim).double().requires_grad_(False)
    layer.to_out[0].weight.copy_(torch.eye(width))
    layer.to_out[0].bias.zero_()
    return layer, in_numpy([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight])


def test_capture_keeps_queries_and_keys_of_every_layer_for_maps():
    """In this order, of cross-attention, too, while `store` has the keys and values of self-attention alone."""
    (q, k, v), store, maps = torch.arange(3.0).view(3, 1, 1, 1, 1), {}, {}
    for site in (SELF, CROSS):
        assert torch.equal(capture(store, maps=maps)(q, k, v, site), attend(q, k, v))
    assert store == {SELF.name: (k, v)} and maps == {SELF.name: (q, k), CROSS.name: (q, k)}


@KERNELS
@pytest.mark.parametrize("ref_rows", [1, 2])
def test_capture_then_isa_is_eq_5(kernel, ref_rows):
    """Projecting z̄ ⊕ z is what capturing in a pass over z̄ and appending in a pass over z computes."""
    layer, projections = layer_of(12, heads=3)
    layer.site = SELF
    z_ref, z, store = normal(ref_rows, 6, 12), normal(ROWS, 6, 12), {}
    layer(z_ref, z_ref, capture(store, kernel))
    y = layer(z, z, isa(store, kernel=kernel))
    assert_is(y, oracle.isa_layer(*in_numpy([z, z_ref]), *projections, heads=3))


@KERNELS
def test_dca_is_eqs_7_and_8(kernel):
    """Two contexts, each through its own W_K and W_V, and one query."""
    layer, projections = layer_of(12, heads=3, context_dim=8)
    image_layer, (_, w_k_ip, w_v_ip) = layer_of(12, heads=3, context_dim=8)
    layer.site = CROSS
    z, text, image = normal(ROWS, 6, 12), normal(ROWS, 77, 8), normal(2, 4, 8)
    ip_kv = {CROSS.name: [w(image).unflatten(-1, (3, 4)).transpose(1, 2)
                          for w in (image_layer.to_k, image_layer.to_v)]}
    y = layer(z, text, dca(ip_kv, kernel=kernel))
    image_by_row = oracle.for_rows(image.numpy(), ROWS)
    assert_is(y, oracle.dca_layer(*in_numpy([z, text]), image_by_row, *projections, w_k_ip, w_v_ip, heads=3))
