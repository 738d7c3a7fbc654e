"""The sampling loop: the exact identities that the method must satisfy, in float64, for both readings of Eq. 9."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from steps import condition, predict_at

from isadca import Method, Problem, Run, attend, attend_reference, blend, by_kind, dca, isa, sample
from isadca.app.flags import parse_lam
from isadca.ddim import step
from isadca.loop import adain, guide
from isadca.methods import PRESETS, Cosine, Linear, method_named
from isadca.reference import replay

MIXES = ("noise", "attention")
TIGHT = dict(rtol=0, atol=1e-9)  # float64; guidance and eight layers of softmax amplify the last digits
PROMPT = "a lemon"


def run(model, ref, method, prompt=PROMPT, seeds=(0,), **options):
    [z] = sample(model, ref, [Run(prompt, method, seeds)], **options)
    return z


def plain_loop(model, z, steps, attend_fn=attend, context_rows=("", PROMPT), m=7.0):
    """Text-guided DDIM, written without the loop under test."""
    context = model.context(list(context_rows))
    for t, t_prev in model.schedule.steps(steps):
        eps_u, eps_c = model.noise(torch.cat([z, z]), t, context, attend_fn).chunk(2)
        eps = eps_u + m * (eps_c - eps_u)
        z = step(z, eps, model.schedule.alpha_bar(t), model.schedule.alpha_bar(t_prev))
    return z


def image_kv(model, ref):
    return condition(model, ref, Run(PROMPT, Method(lam=0.5))).ip_kv


# ---- the two ends ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix", MIXES)
def test_lam_0_is_ip_adapter_alone(tiny, tiny_ref, mix):
    expected = plain_loop(tiny, tiny_ref.chain[-1:], 6, dca(image_kv(tiny, tiny_ref), 0.8))
    torch.testing.assert_close(run(tiny, tiny_ref, Method(lam=0, mix=mix, ip_scale=0.8)), expected, **TIGHT)


@pytest.mark.parametrize("mix", MIXES)
def test_lam_0_does_not_see_the_reference(tiny, tiny_ref, mix):
    other = replace(tiny_ref, chain=torch.cat([torch.randn_like(tiny_ref.chain[:-1]), tiny_ref.chain[-1:]]))
    method = Method(lam=0, mix=mix)
    assert torch.equal(run(tiny, tiny_ref, method), run(tiny, other, method))


@pytest.mark.parametrize("mix", MIXES)
def test_lam_1_is_isa_alone(tiny, tiny_ref, mix):
    z = tiny_ref.chain[-1:]
    context = tiny.context(["", PROMPT])
    for (t, t_prev), seen in zip(tiny.schedule.steps(6), replay(tiny, tiny_ref)):
        eps = guide(tiny.noise(torch.cat([z, z]), t, context, isa(seen.kv)).chunk(2), 7.0)
        z = step(z, eps, tiny.schedule.alpha_bar(t), tiny.schedule.alpha_bar(t_prev))
    torch.testing.assert_close(run(tiny, tiny_ref, Method(lam=1, mix=mix)), z, **TIGHT)


@pytest.mark.parametrize("mix", MIXES)
def test_lam_1_does_not_see_the_image_prompt(tiny, tiny_ref, mix):
    method = Method(lam=1, mix=mix)
    other = run(tiny, tiny_ref, method, image_embeds=torch.randn(1, 20, dtype=torch.float64))
    assert torch.equal(run(tiny, tiny_ref, method), other)


@pytest.mark.parametrize("mix", MIXES)
def test_between_the_ends_both_matter(tiny, tiny_ref, mix):
    method, other = Method(lam=0.5, mix=mix), torch.randn(1, 20, dtype=torch.float64)
    z = run(tiny, tiny_ref, method)
    assert (z - run(tiny, tiny_ref, method, image_embeds=other)).abs().max() > 1e-3
    assert (z - run(tiny, tiny_ref, replace(method, lam=0.6))).abs().max() > 1e-3


@pytest.mark.parametrize("mix", MIXES)
def test_without_image_branch_lam_0_is_plain_text_to_image(tiny, tiny_ref, mix):
    expected = plain_loop(tiny, tiny_ref.chain[-1:], 6)
    for method in (Method(lam=0, mix=mix, ip_scale=0), Method(lam=0.7, mix=mix, k=999)):
        torch.testing.assert_close(run(tiny, tiny_ref, method), expected, **TIGHT)


def test_without_isa_and_image_branch_lam_is_irrelevant(tiny, tiny_ref):
    a, b = (run(tiny, tiny_ref, Method(lam=lam, ip_scale=0, layers=())) for lam in (0.2, 0.9))
    torch.testing.assert_close(a, b, **TIGHT)


# ---- Eq. 9 -------------------------------------------------------------------------------------------------------

def test_mixing_noise_is_mixing_the_updated_latents(tiny, tiny_ref):
    def check(run, t, z, noise):
        levels = [tiny.schedule.alpha_bar(level) for level in (t, t - 1000 // 6)]
        mixed = step(z, noise.mixed, *levels)
        parts = 0.3 * step(z, noise.isa, *levels) + 0.7 * step(z, noise.dca, *levels)
        torch.testing.assert_close(mixed, parts, **TIGHT)
        seen_t.append(t)
    seen_t = []
    run(tiny, tiny_ref, Method(lam=0.3), on_step=check)
    assert seen_t == [t for t, _ in tiny.schedule.steps(6)]


def test_guidance_and_mixing_commute():
    u, c, u2, c2 = torch.randn(4, 1, 4, 3, 3, dtype=torch.float64)
    guided_after = guide([0.3 * u + 0.7 * u2, 0.3 * c + 0.7 * c2], 7.0)
    guided_before = 0.3 * guide([u, c], 7.0) + 0.7 * guide([u2, c2], 7.0)
    torch.testing.assert_close(guided_after, guided_before)
    assert torch.equal(guide([u, c], 0.0), u) and torch.equal(guide([c]), c)


def test_the_attention_mix_is_one_expression_of_the_seam(tiny, tiny_ref):
    def by_hand(controls):
        return by_kind(blend(attend, isa(controls.ref_kv), controls.lam), dca(controls.ip_kv, 1 - controls.lam))
    expected = run(tiny, tiny_ref, Method(lam=0.4, mix="attention"))
    torch.testing.assert_close(run(tiny, tiny_ref, Method(lam=0.4, mix=by_hand)), expected, **TIGHT)


def test_reference_equal_to_the_variation_makes_isa_plain(tiny, tiny_ref):
    """Same latent, same context, no guidance: the reference's keys are the variation's own, twice."""
    [seen] = [s for i, s in enumerate(replay(tiny, tiny_ref)) if i == 0]
    t = tiny.schedule.steps(6)[0].t
    told = condition(tiny, tiny_ref, Run("", Method(guidance=1, lam=1)))
    z = tiny_ref.chain[-1:]
    isa_noise = predict_at(tiny, z, t, told, seen, Method(lam=1, guidance=1)).mixed
    torch.testing.assert_close(isa_noise, tiny.noise(z, t, told.context), **TIGHT)
    torch.testing.assert_close(isa_noise, seen.eps, **TIGHT)


def test_kernels_are_interchangeable(tiny, tiny_ref):
    fast, slow = (run(tiny, tiny_ref, Method(), kernel=kernel) for kernel in (attend, attend_reference))
    torch.testing.assert_close(fast, slow, **TIGHT)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lam=st.floats(0.01, 0.99), scale=st.floats(-2, 2), m=st.floats(0, 12), i=st.integers(0, 5))
def test_eq_9_holds_for_any_lam_scale_guidance_and_step(tiny, tiny_ref, lam, scale, m, i):
    """Noise: the mix of the two ends, from the same z_t. Attention: one expression of the seam."""
    method = Method(lam=lam, ip_scale=scale, guidance=m)
    seen, (t, _) = list(replay(tiny, tiny_ref))[i], tiny.schedule.steps(6)[i]
    z, told = tiny_ref.chain[3:4], condition(tiny, tiny_ref, Run(PROMPT, method))

    def noise(method):
        return predict_at(tiny, z, t, told, seen, method).mixed
    ends = lam * noise(replace(method, lam=1)) + (1 - lam) * noise(replace(method, lam=0))
    torch.testing.assert_close(noise(method), ends, **TIGHT)
    by_hand = by_kind(blend(attend, isa(seen.kv), lam), dca(told.ip_kv, (1 - lam) * scale))
    eps_u, eps_c = tiny.noise(torch.cat([z, z]), t, told.context, by_hand).chunk(2)
    torch.testing.assert_close(noise(replace(method, mix="attention")), eps_u + m * (eps_c - eps_u), **TIGHT)


@given(k=st.integers(0, 999), t_start=st.integers(1, 1000), t=st.integers(0, 1000), lam=st.floats(0, 1))
def test_a_reference_row_is_asked_for_exactly_where_it_is_used(k, t_start, t, lam):
    method = Method(k=k, t_start=t_start, lam=lam)
    assert method.is_active(t) == (k < t <= t_start)
    assert method.wants_reference(t, 1000) == (k < t <= t_start and lam > 0)
    assert replace(method, adain_above=-1).wants_reference(t, 1000) == (lam > 0)


# ---- when and where ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k, t_start", [(0, 1000), (333, 1000), (0, 667), (167, 500), (1, 999)])
def test_control_is_on_exactly_for_k_below_t_up_to_t_start(tiny, tiny_ref, k, t_start):
    asked = []

    def probe(controls):
        asked.append(controls.t)
        return attend
    run(tiny, tiny_ref, Method(mix=probe, k=k, t_start=t_start))
    assert asked == [t for t, _ in tiny.schedule.steps(6) if k < t <= t_start]


def test_lam_may_depend_on_time(tiny, tiny_ref):
    used = []

    def probe(controls):
        used.append(controls.lam)
        return attend
    run(tiny, tiny_ref, Method(lam=lambda t, T: t / T, mix=probe))
    assert used == [t / 1000 for t, _ in tiny.schedule.steps(6)]
    constant = run(tiny, tiny_ref, Method(lam=0.4))
    assert torch.equal(run(tiny, tiny_ref, Method(lam=lambda t, T: 0.4)), constant)


def test_lam_helpers_have_their_ends():
    for shape in (Linear, Cosine):
        lam = shape(1.0, 0.2)
        assert lam(1000, 1000) == pytest.approx(1.0) and lam(0, 1000) == pytest.approx(0.2)
        assert lam(500, 1000) == pytest.approx(0.6)
        assert all(lam(t, 1000) < lam(t + 1, 1000) for t in range(0, 1000, 50))
    assert Cosine(1, 0)(100, 1000) < Linear(1, 0)(100, 1000)  # slow at the end
    assert parse_lam("0.7") == 0.7 and parse_lam("linear:1:0.3") == Linear(1, 0.3)
    assert parse_lam("cosine:0.9:0") == Cosine(0.9, 0)


@pytest.mark.parametrize("text", ["", "x", "1.1", "-0.1", "nan", "inf", "linear:1", "linear:1:2", "cosine:0:0:0"])
def test_bad_lam_is_refused(text):
    with pytest.raises(Problem, match="expected"):
        parse_lam(text)


@pytest.mark.parametrize("change, word", [
    (dict(lam=1.5), "lam"), (dict(lam=float("nan")), "lam"), (dict(guidance=float("nan")), "guidance"),
    (dict(k=1000), "k"), (dict(k=-1), "k"), (dict(k=500, t_start=500), "t_start"), (dict(mix="both"), "mix"),
    (dict(init="zeros"), "init"), (dict(diversity=1.1), "diversity"), (dict(ip_scale=float("inf")), "ip_scale"),
    (dict(lam=lambda t, T: 2.0), "lam"), (dict(layers=(0, 7)), "layers"), (dict(layers=(-8,)), "layers")])
def test_a_method_that_makes_no_sense_is_refused(tiny, tiny_ref, change, word):
    with pytest.raises(Problem, match=f"^{word} is .*expected"):
        run(tiny, tiny_ref, Method(**change))


def test_layers_and_modes_reach_the_right_sites(tiny, tiny_ref):
    """ISA lengthens the keys where it is on, in append mode; in replace mode the reference alone is there."""
    def lengths(method):
        seen = {}

        def kernel(q, k, v, site):
            if site.kind == "self" and len(q) == 2:  # not the replay's rows
                seen.setdefault(site.layer, set()).add(k.shape[2] / q.shape[2])
            return attend(q, k, v, site)
        run(tiny, tiny_ref, method, kernel=kernel, at_once=6)
        return seen
    all_layers = {s.layer for s in tiny.unet.sites}
    assert lengths(Method(lam=1)) == {layer: {2.0} for layer in all_layers}
    assert lengths(Method(lam=1, replace_above=-1)) == {layer: {1.0} for layer in all_layers}
    assert lengths(Method(lam=1, replace_above=499)) == {layer: {1.0, 2.0} for layer in all_layers}
    some = lengths(Method(lam=1, layers=(1, 3)))
    assert {layer for layer, ratio in some.items() if ratio == {2.0}} == {1, 3}
    last = lengths(Method(lam=1, layers=(-1, -2)))
    assert {layer for layer, ratio in last.items() if ratio == {2.0}} == set(sorted(all_layers)[-2:])


def test_adain_takes_the_reference_moments():
    x, ref = torch.randn(3, 4, 8, 8, dtype=torch.float64) * 3 + 1, torch.randn(1, 4, 8, 8, dtype=torch.float64)
    y = adain(x, ref)
    torch.testing.assert_close(y.mean((2, 3)), ref.mean((2, 3)).expand(3, -1))
    torch.testing.assert_close(y.var((2, 3)), ref.var((2, 3)).expand(3, -1), rtol=1e-4, atol=0)  # 1e-5 in the root
    torch.testing.assert_close(adain(ref, ref), ref)


def test_adain_acts_on_isa_before_the_mix_and_only_above_its_threshold(tiny, tiny_ref):
    moments = []

    def note(run, t, z, noise):
        moments.append((t, noise.isa.std().item() - noise.dca.std().item(), noise))
    sights = {t: seen.eps for (t, _), seen in zip(tiny.schedule.steps(6), replay(tiny, tiny_ref))}
    run(tiny, tiny_ref, Method(lam=0.5, adain_above=499), on_step=note)
    for t, _, noise in moments:
        aligned = torch.allclose(noise.isa.mean((2, 3)), sights[t].mean((2, 3)), atol=1e-9)
        assert aligned == (t > 499)  # 499 itself is a step
        assert not torch.allclose(noise.dca.mean((2, 3)), sights[t].mean((2, 3)), atol=1e-6)


def test_a_preset_is_found_by_its_name():
    assert method_named("rival") is PRESETS["rival"]
    with pytest.raises(Problem, match="expected one of"):
        method_named("stylegan")


def test_gradients_reach_the_reference(tiny, tiny_ref):
    """The loop is differentiable: d picture / d z̄_T, against a finite difference."""
    def last(chain):
        ref = replace(tiny_ref, chain=chain)
        return sample(tiny, ref, [Run(PROMPT, Method(guidance=2.0))])[0].square().sum()
    chain = tiny_ref.chain.clone().requires_grad_()
    [grad] = torch.autograd.grad(last(chain), chain)
    bump = torch.zeros_like(chain)
    bump[3] = torch.randn_like(chain[3])
    numeric = (last(chain + 1e-5 * bump) - last(chain - 1e-5 * bump)) / 2e-5
    assert (grad * bump).sum().item() == pytest.approx(numeric.item(), rel=1e-4)
    assert grad[3].abs().max() > 0
