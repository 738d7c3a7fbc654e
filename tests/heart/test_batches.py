"""Rows, batches and seeds: what a picture costs, and that it is the same whatever it is made together with."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from isadca import Method, Run, invert, replay, sample, vary
from isadca.common.images import to_images
from isadca.reference import initial_latents
from isadca.methods import PRESETS

TIGHT = dict(rtol=0, atol=1e-9)


def run(model, ref, method, prompt="a lemon", seeds=(0,), **options):
    [z] = sample(model, ref, [Run(prompt, method, seeds)], **options)
    return z


@contextmanager
def counted_rows(model):
    """Counts the rows that go through the UNet, at its first layer."""
    rows = []
    hook = model.unet.conv_in.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    yield rows
    hook.remove()


@pytest.mark.parametrize("method, per_step", [
    (Method(lam=0.5), 4), (Method(lam=0.5, mix="attention"), 2), (Method(lam=1), 2), (Method(lam=0), 2),
    (Method(lam=0.5, guidance=1), 2), (Method(lam=1, guidance=1), 1), (Method(lam=0.5, k=400), 3)])
def test_rows_of_one_variation(tiny, tiny_ref, method, per_step):
    """Six steps; k=400 leaves three of them plain. Steps that use the reference replay one row each."""
    with counted_rows(tiny) as rows:
        run(tiny, tiny_ref, method)
    steps = [t for t, _ in tiny.schedule.steps(6)]
    replayed = sum(method.wants_reference(t, 1000) for t in steps)
    assert replayed == (0 if method.lam == 0 else 3 if method.k else 6)
    assert sum(rows) == 6 * per_step + replayed


def test_every_reference_row_is_computed_once_whatever_n_and_however_many_lambdas(tiny, tiny_ref):
    runs = [Run(prompt, Method(lam=lam, init="shuffle"), seeds=(0, 1, 2, 3))
            for prompt in ("a pig", "a lemon", "a house") for lam in (0, 0.25, 0.5, 0.75, 1)]
    with counted_rows(tiny) as rows:
        sample(tiny, tiny_ref, runs)
    variations = 6 * 3 * 4 * (2 + 4 + 4 + 4 + 2)  # steps · prompts · seeds · rows by λ
    assert sum(rows) - variations == 6


def test_a_batch_equals_its_pictures_made_alone(tiny, tiny_ref):
    method = Method(init="shuffle", diversity=0.2)
    together = run(tiny, tiny_ref, method, seeds=(3, 4, 5))
    alone = torch.cat([run(tiny, tiny_ref, method, seeds=(seed,)) for seed in (3, 4, 5)])
    torch.testing.assert_close(together, alone, **TIGHT)
    torch.testing.assert_close(run(tiny, tiny_ref, method, seeds=(3, 4, 5), rows_at_once=1), alone, **TIGHT)
    assert (alone[0] - alone[1]).abs().max() > 0.1


@pytest.mark.parametrize("mix, at_most, calls", [
    ("noise", 1, [4, 4, 4]), ("noise", 7, [4, 4, 4]), ("noise", 8, [8, 4]), ("noise", 11, [8, 4]), ("noise", 12, [12]),
    ("attention", 1, [2, 2, 2]), ("attention", 4, [4, 2]), ("attention", 5, [4, 2]), ("attention", 6, [6])])
def test_a_unet_call_has_as_many_rows_as_it_may(tiny, tiny_ref, mix, at_most, calls):
    """Three variations cost 12 rows a step in the noise mix, 6 in the attention mix; one is the least that is made."""
    kept = list(replay(tiny, tiny_ref))
    with counted_rows(tiny) as rows:
        run(tiny, tiny_ref, Method(lam=0.5, mix=mix), seeds=(0, 1, 2), replayed=kept, rows_at_once=at_most)
    assert rows == calls * 6


def test_progress_is_told_what_and_how_many(tiny, tiny_ref):
    told = []
    run(tiny, tiny_ref, Method(), progress=lambda steps, label: told.append((label, len(steps))) or steps)
    assert told == [("sampling", 6)]


def test_vary_is_sample_and_decode(tiny, tiny_ref):
    """Without being told otherwise: seed 0, no negative prompt."""
    method, pictures = Method(init="shuffle"), []
    for run_, given in [(Run("a pig", method, (0,), ""), {}),
                        (Run("a pig", method, (3, 4), "a lemon"), {"seeds": (3, 4), "negative": "a lemon"})]:
        [z] = sample(tiny, tiny_ref, [run_])
        pictures += vary(tiny, tiny_ref, "a pig", method, **given)
        expected = to_images(torch.cat([tiny.decode(row[None]) for row in z]))
        assert [p.tobytes() for p in pictures[-len(z):]] == [p.tobytes() for p in expected]
    assert len({p.tobytes() for p in pictures}) == 3


def test_runs_side_by_side_equal_runs_alone(tiny, tiny_ref):
    runs = [Run("a pig", Method(lam=0)), Run("a lemon", Method(lam=0.7)), Run("a pig", Method(lam=1, k=400))]
    for z, alone in zip(sample(tiny, tiny_ref, runs), runs):
        torch.testing.assert_close(z, sample(tiny, tiny_ref, [alone])[0], **TIGHT)


def test_twice_the_same_30_steps(tiny, tiny_ref):
    """Code that counts its calls starts the second picture in the wrong phase where steps do not divide 1000."""
    ref = invert(tiny, tiny_ref.image, steps=30)
    first, second = (run(tiny, ref, PRESETS["rival"]) for _ in range(2))
    assert torch.equal(first, second)


def test_shuffle_moves_whole_cells(tiny_ref):
    z_T = tiny_ref.chain[-1]
    [z] = initial_latents(tiny_ref, Method(init="shuffle"), (5,))
    assert not torch.equal(z, z_T)
    cells = [sorted(map(tuple, x.flatten(1).T.tolist())) for x in (z, z_T)]  # one 4-vector per cell
    assert cells[0] == cells[1]


def test_initial_latents_depend_on_their_seed_alone(tiny_ref):
    for method in (Method(init="random"), Method(init="shuffle"), Method(diversity=0.5)):
        batch = initial_latents(tiny_ref, method, (1, 2, 3))
        assert torch.equal(batch[1:2], initial_latents(tiny_ref, method, (2,)))
        assert not torch.equal(batch[0], batch[1])
    assert torch.equal(initial_latents(tiny_ref, Method(), (0,)), tiny_ref.chain[-1:])


def test_a_run_that_names_no_seed_has_seed_0_alone(tiny_ref):
    method = Method(init="shuffle")
    assert torch.equal(initial_latents(tiny_ref, method, (0,)), initial_latents(tiny_ref, method, (0,)))


def test_diversity_adds_the_noise_that_random_starts_from(tiny_ref):
    """z_T = √(1-d) z̄_T + √d ε, with the seed's ε."""
    eps = initial_latents(tiny_ref, Method(init="random"), (4,))
    z = initial_latents(tiny_ref, Method(diversity=0.36), (4,))
    torch.testing.assert_close(z, 0.8 * tiny_ref.chain[-1:] + 0.6 * eps)


def test_diversity_keeps_the_variance(tiny_ref):
    wide = replace(tiny_ref, chain=torch.randn(2, 4, 64, 64))
    for d in (0.0, 0.3, 1.0):
        z = initial_latents(wide, Method(diversity=d), tuple(range(4)))
        assert z.std().item() == pytest.approx(1, abs=0.02)
    fresh = initial_latents(wide, Method(diversity=1.0), (0,))
    assert abs((fresh * wide.chain[-1]).mean().item()) < 0.03  # nothing of z̄_T is left
