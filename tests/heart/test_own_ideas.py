"""What a researcher's own method can be made of, and what a run can be told: masks, several references, guidance of
one's own, gradients, embeddings. All exact identities, in float64."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from steps import condition

import isadca
from isadca import Guided, Method, Problem, Run, attend, dca, invert, isa, masked, reconstruct, replay, sample, vary
from isadca.evaluation.metrics import psnr

TIGHT = dict(rtol=0, atol=1e-9)
PROMPT = "a lemon"
PICTURE = Image.new("RGB", (16, 16), "teal")


def run(model, ref, method=Method(), prompt=PROMPT, seeds=(0,), **options):
    [z] = sample(model, ref, [Run(prompt, method, seeds)], **options)
    return z


@pytest.fixture(scope="module")
def other_ref(tiny):
    return invert(tiny, PICTURE, steps=6)


# ---- masks ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix", ["noise", "attention"])
def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_is_plain(tiny, tiny_ref, mix):
    method = Method(mix=mix)
    torch.testing.assert_close(run(tiny, tiny_ref, method, mask=torch.ones(8, 8)), run(tiny, tiny_ref, method), **TIGHT)
    plain = run(tiny, tiny_ref, Method(lam=0, ip_scale=0))
    torch.testing.assert_close(run(tiny, tiny_ref, method, mask=torch.zeros(3, 5)), plain, **TIGHT)


def test_masked_is_one_function_on_the_left_and_another_on_the_right(tiny):
    site = next(s for s in tiny.unet.sites if s.kind == "self")._replace(hw=(2, 4))
    q, k, v = torch.randn(3, 6, 3, 8, 4, dtype=torch.float64)  # two halves of three variations, three heads
    f, g = (lambda *x: torch.ones_like(q)), (lambda *x: torch.zeros_like(q))
    left = torch.tensor([[1.0, 0], [1, 0]])
    for mask in (left, left.repeat_interleave(5, 1), torch.stack([left, 1 - left, left])):
        y = masked(f, g, mask)(q, k, v, site)[:, 0, :, 0].unflatten(1, (2, 4))
        flipped = mask.ndim == 3
        for row in range(6):
            expected = torch.tensor([1.0, 1, 0, 0] if not flipped or row % 3 != 1 else [0.0, 0, 1, 1])
            assert torch.equal(y[row], expected.double().expand(2, 4))


def test_what_is_kept_is_the_reference_itself_at_every_step(tiny, tiny_ref):
    """Below the kept half the chain's own latents stand at each level; z_0 there is the encoded picture."""
    keep, seen = torch.zeros(8, 8), []
    keep[:, :4] = 1
    z = run(tiny, tiny_ref, keep=keep, on_step=lambda run, t, z, noise: seen.append(z))
    assert torch.equal(z[..., :4], tiny_ref.chain[:1, ..., :4]) and not torch.equal(z, tiny_ref.chain[:1])
    for z_t, level in zip(seen[1:], range(5, 0, -1)):
        assert torch.equal(z_t[0, :, :, :4], tiny_ref.chain[level, :, :, :4])


# ---- references ---------------------------------------------------------------------------------------------------

def test_the_same_reference_twice_is_itself(tiny, tiny_ref):
    """Attention to a set of keys given twice is attention to the set, where nothing else is attended to."""
    method = Method(lam=1, replace_above=-1)
    twice = run(tiny, tiny_ref, method, also=[tiny_ref])
    torch.testing.assert_close(twice, run(tiny, tiny_ref, method), **TIGHT)


def test_several_references_join_their_tokens(tiny, tiny_ref, other_ref):
    kvs = [step.kv for step in next(zip(replay(tiny, tiny_ref), replay(tiny, other_ref)))]
    seen = []

    def look(controls):
        seen.append(controls)
        return attend
    run(tiny, tiny_ref, Method(mix=look), also=[other_ref])
    for name, (k, _) in seen[0].ref_kv.items():
        assert torch.equal(k, torch.cat([kvs[0][name][0], kvs[1][name][0]], dim=2))
    tokens = [condition(tiny, ref, Run(PROMPT)).ip_kv for ref in (tiny_ref, other_ref)]
    for name, (_, v) in seen[0].ip_kv.items():
        torch.testing.assert_close(v, torch.cat([tokens[0][name][1], tokens[1][name][1]], dim=2), **TIGHT)


def test_structure_of_one_and_look_of_the_other(tiny, tiny_ref, other_ref):
    """A kept replay of another reference: its keys and values, this one's latents."""
    z = run(tiny, tiny_ref, Method(lam=1), replayed=list(replay(tiny, other_ref)))
    assert (z - run(tiny, tiny_ref, Method(lam=1))).abs().max() > 1e-3
    assert (z - run(tiny, other_ref, Method(lam=1))).abs().max() > 1e-3


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_a_replay_of_another_length_is_refused(tiny, tiny_ref, kept):
    steps = (list(replay(tiny, tiny_ref)) * 2)[:kept]
    with pytest.raises(Problem, match=f"replayed has {kept} steps, the reference has 6"):
        run(tiny, tiny_ref, replayed=steps)
    if kept < 6:  # an iterator that ends early
        with pytest.raises(Problem, match=f"replayed has {kept} steps"):
            run(tiny, tiny_ref, replayed=iter(steps))


def test_a_longer_inversion_serves_fewer_steps(tiny):
    """In exact arithmetic of the grid: the levels that a longer stride visits are among those of a shorter one."""
    ref = invert(tiny, PICTURE, steps=20)
    short = ref.every(4)
    assert short.steps == 5
    assert torch.equal(short.chain[-1], ref.chain[17]) and torch.equal(short.chain[0], ref.chain[0])
    assert [t for t, _ in tiny.schedule.steps(5)] == [t for t, _ in tiny.schedule.steps(20)][3::4]
    with pytest.raises(Problem, match="20 steps, which 3 does not divide"):
        ref.every(3)


@pytest.mark.parametrize("init", ["inverted", "shuffle", "gaussian", "random"])
def test_every_start_gives_a_picture_of_its_own(tiny, tiny_ref, init):
    started = run(tiny, tiny_ref, Method(init=init))
    others = [run(tiny, tiny_ref, Method(init=other)) for other in ("inverted", "random") if other != init]
    assert all((started - other).abs().max() > 1e-3 for other in others)


def test_a_method_says_how_many_steps_a_picture_is_inverted_with(tiny):
    """A Reference that is there has its own; to ask for others is an error, not ignored."""
    seen = {}
    count = lambda items, label: seen.setdefault(label, len(items)) and items
    quick = isadca.PRESETS["quick"]
    assert quick == Method("quick", steps=10, source=quick.source)
    vary(tiny, PICTURE, PROMPT, "quick", progress=count)
    assert seen == {"inverting": 10, "sampling": 10}
    seen.clear()
    vary(tiny, PICTURE, PROMPT, steps=3, progress=count)
    assert seen == {"inverting": 3, "sampling": 3}
    ref = invert(tiny, PICTURE, 4)
    vary(tiny, ref, PROMPT, "quick", steps=4)
    with pytest.raises(Problem, match="steps is 3, the reference was inverted with 4; give the picture"):
        vary(tiny, ref, PROMPT, steps=3)


def test_fixed_point_iterations_bring_the_way_back_to_the_way_up(demo, cat):
    """Against the autoencoder's own way there and back, of which no inversion can be better."""
    found = []
    for n in (0, 1):
        ref = invert(demo, cat, 10, fixed_point=n)
        [there_and_back] = isadca.decode(demo, ref.chain[:1])
        found.append(psnr(reconstruct(demo, ref), there_and_back))
    assert found[0] + 4 < found[1]


# ---- guidance, gradients, embeddings ------------------------------------------------------------------------------

def test_two_rows_of_guidance_are_the_usual_ones(tiny, tiny_ref):
    def by_hand(controls):
        unconditional, text = controls.conditions.context.split(1)
        branch = isa(controls.ref_kv)
        return [Guided(unconditional, branch, 0.0), Guided(text, branch, 7.0)]
    torch.testing.assert_close(run(tiny, tiny_ref, Method(mix=by_hand)), run(tiny, tiny_ref, Method(lam=1)), **TIGHT)


def test_a_third_row_of_guidance_adds_its_weighted_difference(tiny, tiny_ref):
    """Perturbed-attention guidance, arXiv 2403.17377: away from what attends only to itself."""
    seen = []

    def own(q, k, v, site):
        return v if site.kind == "self" else attend(q, k, v, site)

    def by_hand(controls):
        seen.append(controls)
        unconditional, text = controls.conditions.context.split(1)
        return [Guided(unconditional, attend, 0.0), Guided(text, attend, 10.0), Guided(text, own, -3.0)]
    found = []
    run(tiny, tiny_ref, Method(mix=by_hand), on_step=lambda run, t, z, noise: found.append(noise.mixed))
    c = seen[0]
    eps_u, eps_c = tiny.noise(c.z.repeat(2, 1, 1, 1), c.t, c.conditions.context).chunk(2)
    eps_own = tiny.noise(c.z, c.t, c.conditions.context[1:], own)
    torch.testing.assert_close(found[0], eps_u + 7 * (eps_c - eps_u) + 3 * (eps_c - eps_own), **TIGHT)


def test_each_row_of_guidance_has_its_own_attention(tiny, tiny_ref):
    """All three are different."""
    seen = []

    def by_hand(controls):
        seen.append(controls)
        own = [isa(controls.ref_kv), attend, isa(controls.ref_kv, "replace")]
        return [Guided(half, f, w) for half, f, w in zip(controls.conditions.text_kv * 2, own, (0, 7, 2))]
    found = []
    run(tiny, tiny_ref, Method(mix=by_hand), on_step=lambda run, t, z, noise: found.append(noise.mixed))
    c = seen[0]
    eps = [tiny.noise(c.z, c.t, row.context, row.attend) for row in by_hand(c)]
    torch.testing.assert_close(found[0], eps[0] + 7 * (eps[1] - eps[0]) + 2 * (eps[2] - eps[0]), **TIGHT)


def test_a_pair_of_functions_is_mixed_as_noise(tiny, tiny_ref):
    def pair(controls):
        return isa(controls.ref_kv), dca(controls.ip_kv)
    torch.testing.assert_close(run(tiny, tiny_ref, Method(mix=pair)), run(tiny, tiny_ref, Method()), **TIGHT)


@pytest.mark.parametrize("mix", ["noise", "attention"])
def test_gradients_reach_lam(tiny, tiny_ref, mix):
    lam = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    value = lambda x: run(tiny, tiny_ref, Method(lam=x, mix=mix)).square().sum()
    [slope] = torch.autograd.grad(value(lam), lam)
    with torch.no_grad():
        expected = (value(0.4 + 1e-6) - value(0.4 - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=0)


def test_another_z_t_is_predicted_from(tiny, tiny_ref):
    """What on_step returns at the first step is where sampling starts."""
    start = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    first = tiny.schedule.steps(6)[0].t
    z = run(tiny, tiny_ref, on_step=lambda run, t, z, noise: start if t == first else None)
    elsewhere = replace(tiny_ref, chain=torch.cat([tiny_ref.chain[:-1], start]))
    expected = run(tiny, elsewhere, replayed=list(replay(tiny, tiny_ref)))
    torch.testing.assert_close(z, expected, **TIGHT)


def test_a_method_may_change_z_t_before_each_step(tiny, tiny_ref):
    """It reads the model and the step's controls; what it returns is what on_step is told and the step starts from."""
    def halved(model, controls):
        assert model is tiny
        return controls.z / 2
    given = []
    z = run(tiny, tiny_ref, Method(before_step=halved), on_step=lambda run, t, z, noise: given.append(z))
    by_hand = run(tiny, tiny_ref, on_step=lambda run, t, z, noise: z / 2)
    torch.testing.assert_close(z, by_hand, **TIGHT)
    torch.testing.assert_close(given[0], tiny_ref.chain[-1:] / 2, **TIGHT)


def test_controls_hold_the_references_at_the_step(tiny, tiny_ref, other_ref):
    seen = []
    run(tiny, tiny_ref, Method(mix=lambda c: seen.append(c.ref_z) or attend), also=[other_ref])
    for i, z in enumerate(seen):
        assert torch.equal(z, torch.stack([tiny_ref.chain[6 - i], other_ref.chain[6 - i]]))


def test_prompts_may_be_embeddings(tiny, tiny_ref):
    embedded = Run(tiny.context([PROMPT])[0], negative=tiny.context(["stripes"])[0])
    [z] = sample(tiny, tiny_ref, [embedded])
    [expected] = sample(tiny, tiny_ref, [Run(PROMPT, negative="stripes")])
    torch.testing.assert_close(z, expected, **TIGHT)


def test_controls_say_which_row_is_what(tiny, tiny_ref):
    seen = []

    def look(controls):
        def rows(q, k, v, site):
            seen.append((controls.n, controls.halves, len(q), controls.i, controls.steps))
            return attend(q, k, v, site)
        return rows
    run(tiny, tiny_ref, Method(mix=look), seeds=tuple(range(5)), rows_at_once=4)
    assert set(seen) == {(5, 2, 10, i, 6) for i in range(6)}, "a method of one's own gets its variations whole"
    run(tiny, tiny_ref, Method(mix=lambda c: seen.append(c.conditions.words) or attend))
    assert seen[-1] == tiny.tokenizer.words(PROMPT)


def test_a_later_run_sees_what_an_earlier_one_left(tiny, tiny_ref):
    """Prompt-to-Prompt's way: at each step the runs are computed in their order."""
    store, order = {}, []
    def writes(controls):
        store[controls.t] = True
        order.append(("first", controls.t))
        return attend
    def reads(controls):
        assert controls.t in store
        order.append(("second", controls.t))
        return attend
    sample(tiny, tiny_ref, [Run("a", Method(mix=writes)), Run("b", Method(mix=reads))])
    assert order == [(who, t) for t, _ in tiny.schedule.steps(6) for who in ("first", "second")]


def test_a_gaussian_start_has_the_references_moments(tiny_ref):
    z_T = torch.randn(1, 4, 64, 64, dtype=torch.float64) * torch.tensor([1, 2, 3, 4.0]).view(1, 4, 1, 1) + 5
    ref = replace(tiny_ref, chain=z_T)
    z = isadca.reference.initial_latents(ref, Method(init="gaussian"), (1, 2))
    torch.testing.assert_close(z.mean((2, 3)), z_T.mean((2, 3)).expand(2, 4), rtol=0, atol=0.3)
    torch.testing.assert_close(z.std((2, 3)), z_T.std((2, 3)).expand(2, 4), rtol=0.05, atol=0)
    assert not torch.equal(z[0], z[1])


# ---- the call as one guesses it -------------------------------------------------------------------------------------

def test_vary_takes_names_fields_lists_and_paths(tiny, tiny_ref, tmp_path):
    same = lambda a, b: [p.tobytes() for p in a] == [p.tobytes() for p in b]
    assert same(vary(tiny, tiny_ref, PROMPT, lam=0.5), vary(tiny, tiny_ref, PROMPT, Method(lam=0.5)))
    rival = isadca.PRESETS["rival"]
    assert same(vary(tiny, tiny_ref, PROMPT, "rival", seeds=3), vary(tiny, tiny_ref, PROMPT, rival, (3,)))
    assert same(vary(tiny, tiny_ref, [PROMPT, "a pig"]), vary(tiny, tiny_ref, PROMPT) + vary(tiny, tiny_ref, "a pig"))
    PICTURE.save(tmp_path / "picture.png")
    assert same(vary(tiny, str(tmp_path / "picture.png"), PROMPT), vary(tiny, invert(tiny, PICTURE), PROMPT))


def test_no_seeds_are_refused(tiny, tiny_ref):
    with pytest.raises(Problem, match="seeds is empty"):
        vary(tiny, tiny_ref, PROMPT, seeds=())
