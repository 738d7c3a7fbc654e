"""What must hold between the variants, exactly or to rounding, and what they must not do."""

import math

import oracle
import pytest
import torch
from attention_cases import CROSS, EACH_VARIANT, KERNELS, ROWS, SELF, assert_is, at_both, drawn, normal
from hypothesis import given, settings, strategies as st

from isadca.attention import (
    attend,
    attend_reference,
    attention_probs,
    blend,
    by_kind,
    by_rows,
    capture,
    dca,
    isa,
    repeat_rows,
    where,
)
from isadca.networks.layers import BasicTransformerBlock

SIZE = (5, 7, 4, 3)  # N, M, d, extra M
MODES = pytest.mark.parametrize("mode", ["append", "replace"])
SHARPNESS = dict(seed=st.integers(0, 2**32), sharpness=st.floats(0, 20))
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture
def q():
    return normal(ROWS, 2, 5, 4)


@pytest.fixture
def k():
    return normal(ROWS, 2, 7, 4)


@pytest.fixture
def v():
    return normal(ROWS, 2, 7, 4)


@pytest.fixture
def extra():
    return normal(1, 2, 3, 4), normal(1, 2, 3, 4)


def forbidden(q, k, v, site):
    pytest.fail(f"called at {site.name}")


def near(a, b, atol=1e-12):
    assert_is(a, b.numpy(), atol)


# ---- plain attention -----------------------------------------------------------------------------------------

@KERNELS
@QUICK
@given(**SHARPNESS)
def test_duplicate_keys_change_nothing(kernel, seed, sharpness):
    """Attn([K;K],[V;V]) = Attn(K,V)."""
    torch.manual_seed(seed)
    q, k, v = normal(2, 2, 5, 4, scale=sharpness), normal(2, 2, 7, 4), normal(2, 2, 7, 4)
    near(kernel(q, torch.cat([k, k], 2), torch.cat([v, v], 2)), kernel(q, k, v))


@KERNELS
@QUICK
@given(**SHARPNESS)
def test_the_order_of_the_keys_does_not_matter(kernel, seed, sharpness):
    torch.manual_seed(seed)
    q, k, v = normal(2, 2, 5, 4, scale=sharpness), normal(2, 2, 7, 4), normal(2, 2, 7, 4)
    order = torch.randperm(7)
    near(kernel(q, k[:, :, order], v[:, :, order]), kernel(q, k, v))


@KERNELS
def test_a_row_and_a_head_see_themselves_only(kernel, q, k, v):
    y = kernel(q, k, v)
    for b in range(ROWS):
        near(kernel(q[b:b + 1, 1:], k[b:b + 1, 1:], v[b:b + 1, 1:]), y[b:b + 1, 1:])


# ---- ISA -----------------------------------------------------------------------------------------------------

@KERNELS
@QUICK
@given(**SHARPNESS)
def test_isa_is_a_gate_between_two_attentions(kernel, seed, sharpness):
    """w·Attn(reference) + (1-w)·Attn(own) with w = σ(LSE_ref - LSE_own) for each query and head; w is the share of
    the attention that the reference's tokens get."""
    torch.manual_seed(seed)
    q, k, v = normal(2, 2, 5, 4, scale=sharpness), normal(2, 2, 7, 4), normal(2, 2, 7, 4)
    k_ref, v_ref = normal(2, 2, 3, 4), normal(2, 2, 3, 4)
    gap = oracle.log_sum_exp(q.numpy(), k_ref.numpy()) - oracle.log_sum_exp(q.numpy(), k.numpy())
    w = torch.from_numpy(gap)[..., None].sigmoid()
    y = isa(at_both((k_ref, v_ref)), kernel=kernel)(q, k, v, SELF)
    near(y, w * kernel(q, k_ref, v_ref) + (1 - w) * kernel(q, k, v))
    near(attention_probs(q, torch.cat([k_ref, k], 2))[..., :3].sum(-1, keepdim=True), w)


@MODES
@KERNELS
def test_isa_with_ones_own_keys_is_plain_attention(mode, kernel, q, k, v):
    near(isa(at_both((k, v)), mode, kernel)(q, k, v, SELF), kernel(q, k, v))


def test_reference_before_self_or_after_is_the_same(q, k, v, extra):
    k_ref, v_ref = (repeat_rows(x, ROWS) for x in extra)
    near(isa(at_both((k_ref, v_ref)))(q, k, v, SELF), isa(at_both((k, v)))(q, k_ref, v_ref, SELF))


def test_replace_sees_the_reference_alone(q, k, v, extra):
    y = isa(at_both(extra), "replace")(q, k, v, SELF)
    assert torch.equal(y, attend(q, *(repeat_rows(x, ROWS) for x in extra)))
    assert torch.equal(y, isa(at_both(extra), "replace")(q, torch.full_like(k, math.nan), v * math.nan, SELF))


@pytest.mark.parametrize("halves", [1, 2])
def test_captured_reference_equals_reference_rows_in_the_batch(halves):
    """RIVAL carries the reference in the batch, one row per guidance half; here it went first and was captured.
    Two blocks deep: in the second, the reference's keys depend on what the first did to its rows."""
    blocks = [BasicTransformerBlock(12, 3, 8).double().requires_grad_(False) for _ in range(2)]
    for i, block in enumerate(blocks):
        block.attn1.site, block.attn2.site = SELF._replace(name=f"{i}.attn1"), CROSS._replace(name=f"{i}.attn2")
    x, context = normal(halves + 2 * halves, 6, 12), normal(halves + 2 * halves, 5, 8)

    def in_batch(q, k, v, site):
        if site.kind == "cross":
            return attend(q, k, v, site)
        k_ref, v_ref = k[:halves].repeat_interleave(2, 0), v[:halves].repeat_interleave(2, 0)
        joined = attend(q[halves:], torch.cat([k[halves:], k_ref], 2), torch.cat([v[halves:], v_ref], 2), site)
        return torch.cat([attend(q[:halves], k[:halves], v[:halves], site), joined])

    def run(x, context, attention):
        for block in blocks:
            x = block(x, context, attention)
        return x
    store = {}
    reference = run(x[:halves], context[:halves], capture(store))
    y = run(x[halves:], context[halves:], isa(store))
    near(torch.cat([reference, y]), run(x, context, in_batch))
    assert (y - run(x[halves:], context[halves:], attend)).abs().max() > 1e-3  # the reference does something


def test_capture_keeps_the_keys_and_values_of_self_attention_only(q, k, v):
    """The very tensors, so that gradients reach the reference; a second pass replaces them."""
    store = {"other": ()}
    attention = capture(store)
    for site in (SELF, CROSS):
        assert torch.equal(attention(q, k, v, site), attend(q, k, v, site))
    assert store.keys() == {"other", SELF.name}
    assert all(kept is given for kept, given in zip(store[SELF.name], (k, v), strict=True))
    attention(q, v, k, SELF)
    assert store[SELF.name][0] is v


# ---- DCA and λ -----------------------------------------------------------------------------------------------

def test_dca_at_scale_0_is_the_text_alone(q, k, v):
    """It does not look for image keys: these are another network's."""
    assert torch.equal(dca({"elsewhere": (k, v)}, 0)(q, k, v, CROSS), attend(q, k, v))


def test_dca_without_an_image_prompt_is_the_text_alone(q, k, v):
    """Not so ISA: without its reference it raises, below."""
    assert torch.equal(dca({}, 0.5)(q, k, v, CROSS), attend(q, k, v))


def test_variants_pass_the_other_kind_of_site_through(q, k, v):
    """Bit-identical, and without looking for extra keys."""
    plain = attend(q, k, v)
    elsewhere = {"elsewhere": (k, v)}
    for attention, site in [(isa({}), CROSS), (isa({}, "replace"), CROSS), (dca(elsewhere), SELF)]:
        assert torch.equal(attention(q, k, v, site), plain)


@pytest.mark.parametrize("weight, asked", [(0, "f"), (0.0, "f"), (1, "g"), (1.0, "g")])
def test_blend_is_exact_at_its_ends(q, k, v, weight, asked):
    """The other function is not called: λ = 1 needs no image prompt and λ = 0 no reference."""
    f, g = (attend, forbidden) if asked == "f" else (forbidden, attend)
    assert torch.equal(blend(f, g, weight)(q, k, v, SELF), attend(q, k, v))


def test_blend_in_attention_scales_the_reference_share_and_the_image_scale(q, k, v, extra):
    """(1-λ)·plain + λ·ISA = λw·a_ref + (1-λw)·a_own;  λ·text + (1-λ)·(text + s·image) = text + (1-λ)s·image."""
    lam, s, kv = 0.7, 0.5, at_both(extra)
    k_ref, v_ref = (repeat_rows(x, ROWS) for x in extra)
    w = attention_probs(q, torch.cat([k_ref, k], 2))[..., :3].sum(-1, keepdim=True)
    near(blend(attend, isa(kv), lam)(q, k, v, SELF),
         lam * w * attend(q, k_ref, v_ref) + (1 - lam * w) * attend(q, k, v))
    near(blend(dca(kv, s), attend, lam)(q, k, v, CROSS), dca(kv, (1 - lam) * s)(q, k, v, CROSS))


# ---- combinators -----------------------------------------------------------------------------------------------

def test_by_rows_keeps_its_parts_apart(q, k, v, extra):
    """What one part of the batch holds, nan included, does not reach the other."""
    both = by_rows(1, isa(at_both(extra)), attend)
    y = both(q, k, v, SELF)
    assert torch.equal(y[:1], isa(at_both(extra))(q[:1], k[:1], v[:1], SELF))
    assert torch.equal(y[1:], attend(q[1:], k[1:], v[1:]))
    for kept, spoilt in [(slice(0, 1), slice(1, ROWS)), (slice(1, ROWS), slice(0, 1))]:
        broken = [x.clone() for x in (q, k, v)]
        for x in broken:
            x[spoilt] = math.nan
        assert torch.equal(both(*broken, SELF)[kept], y[kept])


def test_by_rows_shows_each_function_its_own_rows(q, k, v):
    """All of them once: two branches in one pass must not cost four."""
    seen = []

    def probe(*tensors_and_site):
        seen.append([len(x) for x in tensors_and_site[:3]])
        return tensors_and_site[0]
    by_rows(1, probe, probe)(q, k, v, SELF)
    assert seen == [[1] * 3, [ROWS - 1] * 3]


def test_where_asks_one_function_per_site(q, k, v):
    at_self = where(lambda site: site.kind == "self", attend_reference, forbidden)
    assert torch.equal(at_self(q, k, v, SELF), attend_reference(q, k, v))
    elsewhere = where(lambda site: site.layer >= 12, forbidden)
    assert torch.equal(elsewhere(q, k, v, SELF), attend(q, k, v))
    assert torch.equal(by_kind(forbidden, attend_reference)(q, k, v, CROSS), attend_reference(q, k, v))


@EACH_VARIANT
def test_variants_end_in_the_kernel_they_were_given(variant):
    """Only there, and they tell it the site: another kernel, or one that records maps, sees everything."""
    seen = []

    def zero(q, k, v, site):
        seen.append(site)
        return torch.zeros_like(q)
    q, k, v, *extra = drawn(SIZE)
    attention = variant.build(extra, zero)
    assert attention(q, k, v, variant.site).count_nonzero() == 0
    assert set(seen) == {variant.site}


@EACH_VARIANT
@pytest.mark.parametrize("extra_rows", [1, 2, 4])
def test_no_input_is_modified(variant, extra_rows):
    """Nor what a kernel returns: this one returns its queries."""
    inputs = drawn(SIZE, extra_rows)
    before = [x.clone() for x in inputs]
    for kernel in (attend_reference, attend, lambda q, k, v, site: q):
        variant.build(inputs[3:], kernel)(*inputs[:3], variant.site)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, before))


# ---- rows of the extra keys, and mistakes ----------------------------------------------------------------------

@QUICK
@given(parts=st.integers(1, 5), each=st.integers(1, 5))
def test_each_extra_row_serves_its_neighbours(parts, each):
    """Guidance halves are contiguous, [u u u | c c c], and so are their reference rows."""
    x = torch.arange(parts)[:, None]
    assert repeat_rows(x, parts * each)[:, 0].tolist() == [i // each for i in range(parts * each)]


def test_one_extra_row_is_not_copied(extra):
    assert repeat_rows(extra[0], 64).untyped_storage().data_ptr() == extra[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("attention, site", [(isa, SELF), (dca, CROSS)], ids=["isa", "dca"])
@pytest.mark.parametrize("rows, extra_rows", [(4, 3), (2, 4), (1, 2), (6, 4), (3, 2)])
def test_a_wrong_number_of_extra_rows_is_an_error(attention, site, rows, extra_rows):
    """RIVAL's code quietly leaves the reference out."""
    q, k, v = (normal(rows, 2, 5, 4) for _ in range(3))
    extra = [normal(extra_rows, 2, 3, 4) for _ in range(2)]
    with pytest.raises(ValueError, match=f"extra keys have {extra_rows} rows, the queries {rows}; expected 1, "):
        attention(at_both(extra))(q, k, v, site)


@pytest.mark.parametrize("attention, site", [(isa, SELF), (dca, CROSS)], ids=["isa", "dca"])
def test_missing_extra_keys_are_an_error(attention, site, q, k, v):
    """A store made for another network must not pass for no reference."""
    with pytest.raises(KeyError, match=site.name):
        attention({"elsewhere": (k, v)})(q, k, v, site)


@MODES
def test_isa_without_a_reference_is_an_error(mode, q, k, v):
    with pytest.raises(KeyError, match=SELF.name):
        isa({}, mode)(q, k, v, SELF)


def test_an_unknown_mode_is_an_error_when_isa_is_made():
    with pytest.raises(ValueError, match="'prepend', expected 'append' or 'replace'"):
        isa({}, mode="prepend")
