"""The reference: inverted once, replayed once, saved and loaded."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image

from isadca import (
    Method,
    Problem,
    Reference,
    Run,
    attend,
    capture,
    invert,
    load_reference,
    reconstruct,
    replay,
    sample,
    save_reference,
)
from isadca.common.images import to_images, to_tensor
from isadca.ddim import step
from isadca.evaluation.metrics import psnr
from isadca.networks.unet import UNet
from isadca.reference import initial_latents

EXACT = dict(rtol=0, atol=1e-12)


def test_chain_starts_at_the_picture_and_has_one_latent_a_level(tiny, tiny_ref):
    assert tiny_ref.chain.shape == (7, 4, 8, 8)
    assert torch.equal(tiny_ref.chain[:1], tiny.encode(to_tensor(tiny_ref.image)))


def test_each_link_of_the_chain_is_undone_by_its_own_noise(tiny, tiny_ref):
    """RIVAL's convention: ε(z̄ at the level below, label t) carries the chain up to t."""
    context = tiny.context([""])
    for i, (t, t_prev) in enumerate(reversed(tiny.schedule.steps(6))):
        eps = tiny.noise(tiny_ref.chain[i : i + 1], t, context)
        down = step(tiny_ref.chain[i + 1 : i + 2], eps, tiny.schedule.alpha_bar(t), tiny.schedule.alpha_bar(t_prev))
        torch.testing.assert_close(down, tiny_ref.chain[i : i + 1], **EXACT)


@pytest.mark.parametrize("at_once", [0, 1, 2, 4, 6, 50])
def test_replay_is_the_same_in_chunks_of_any_size(tiny, tiny_ref, at_once):
    live, chunked = list(replay(tiny, tiny_ref, at_once=1)), list(replay(tiny, tiny_ref, at_once=at_once))
    assert len(live) == len(chunked) == 6
    for one, other in zip(live, chunked):
        torch.testing.assert_close(one.eps, other.eps, **EXACT)
        assert one.kv.keys() == other.kv.keys() == {s.name for s in tiny.unet.sites if s.kind == "self"}
        for name in one.kv:
            for a, b in zip(one.kv[name], other.kv[name]):
                assert a.shape[0] == 1
                torch.testing.assert_close(a, b, **EXACT)


def test_replay_evaluates_each_level_with_its_own_label(tiny, tiny_ref):
    """(z̄_t, t), not the inversion's (z̄ below, t)."""
    context = tiny.context([""])
    for i, ((t, _), seen) in enumerate(zip(tiny.schedule.steps(6), replay(tiny, tiny_ref))):
        torch.testing.assert_close(seen.eps, tiny.noise(tiny_ref.chain[6 - i : 7 - i], t, context), **EXACT)


def test_a_row_for_each_guidance_half_is_prompted_like_it(tiny, tiny_ref):
    """The first with nothing, the second as the picture was inverted; a single row is the second."""
    ref, t = replace(tiny_ref, prompt="a cat"), tiny.schedule.steps(6)[0].t
    name = tiny.unet.sites[-2].name                                    # what it has read of the prompt, shows
    [both], [one] = (list(replay(tiny, ref, lambda at: at == t, rows=rows))[:1] for rows in (2, 1))
    for row, prompt in enumerate(["", "a cat"]):
        own = {}
        eps = tiny.noise(ref.chain[6:], t, tiny.context([prompt]), capture(own))
        torch.testing.assert_close(both.kv[name][0][row : row + 1], own[name][0], **EXACT)
    torch.testing.assert_close(one.kv[name][0], own[name][0], **EXACT)
    torch.testing.assert_close(both.eps, eps, **EXACT)


def test_only_wanted_steps_are_replayed(tiny, tiny_ref):
    rows = []

    def kernel(q, k, v, site):
        rows.append(len(q) if site.name == tiny.unet.sites[0].name else 0)
        return attend(q, k, v, site)
    seen = list(replay(tiny, tiny_ref, lambda t: 100 < t < 600, at_once=2, kernel=kernel))
    assert [s is not None for s in seen] == [100 < t < 600 for t, _ in tiny.schedule.steps(6)]
    assert sum(rows) == sum(s is not None for s in seen)


def test_a_kept_replay_serves_several_calls(tiny, tiny_ref):
    kept = list(replay(tiny, tiny_ref, at_once=6))
    for lam in (0.3, 1):
        runs = [Run("a pig", Method(lam=lam))]
        [live], [again] = sample(tiny, tiny_ref, runs), sample(tiny, tiny_ref, runs, replayed=kept)
        torch.testing.assert_close(live, again, rtol=0, atol=1e-9)


def test_replay_keeps_one_chunk_and_drops_it(tiny, tiny_ref):
    """The reference's keys live as long as their steps: with chunks of 2, step 0's are gone when step 2 arrives."""
    storages = []
    for seen in replay(tiny, tiny_ref, at_once=2):  # no enumerate: it holds on to what it gave last
        k, _ = seen.kv[tiny.unet.sites[0].name]
        storages.append(weakref.ref(k))
        del seen, k
        gc.collect()
        assert [ref() is not None for ref in storages] == [False] * len(storages)


def test_keys_and_values_of_a_step_are_as_many_as_derived():
    """SD1.5 at 512²: 44.0625 MiB of fp16 a step in 16 layers (counted from the architecture)."""
    store = {}
    with torch.device("meta"):
        UNet()(torch.zeros(1, 4, 64, 64), 1, torch.zeros(1, 77, 768), capture(store))
    assert len(store) == 16
    assert sum(2 * (k.numel() + v.numel()) for k, v in store.values()) == 44.0625 * 2**20


def test_reconstruction_of_a_demo_picture_looks_like_it(demo, cat):
    ref = invert(demo, cat, steps=50)
    assert psnr(reconstruct(demo, ref), ref.image) > 25


def test_reconstruction_is_plain_ddim_under_the_references_own_prompt(tiny, tiny_ref):
    ref, seen = replace(tiny_ref, prompt="a cat"), []
    context, z = tiny.context(["a cat"]), tiny_ref.chain[[6]]
    for t, t_prev in tiny.schedule.steps(6):
        z = step(z, tiny.noise(z, t, context), tiny.schedule.alpha_bar(t), tiny.schedule.alpha_bar(t_prev))
    back = reconstruct(tiny, ref, progress=lambda items, label: seen.append((len(items), label)) or items)
    assert back.tobytes() == to_images(tiny.decode(z))[0].tobytes() and seen == [(6, "reconstructing")]
    assert back.tobytes() != reconstruct(tiny, tiny_ref).tobytes()


def test_an_inversion_has_the_papers_fifty_steps(tiny, tiny_ref):
    assert invert(tiny, tiny_ref.image).steps == 50


def test_every_kth_step_has_the_levels_of_the_longer_strides(tiny_ref):
    assert torch.equal(tiny_ref.every(1).chain, tiny_ref.chain)
    assert torch.equal(tiny_ref.every(2).chain, tiny_ref.chain[[0, 1, 3, 5]])
    with pytest.raises(Problem, match="6 steps, which 4 does not divide"):
        tiny_ref.every(4)


def test_a_reference_made_by_hand_has_no_prompt(tiny_ref):
    assert Reference(tiny_ref.image, tiny_ref.chain).prompt == ""


def test_a_gaussian_start_is_the_seeds_noise_with_the_references_moments(tiny_ref):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z = tiny_ref.chain[-1:]
    expected = z.mean((2, 3), keepdim=True) + z.std((2, 3), keepdim=True) * noise
    torch.testing.assert_close(initial_latents(tiny_ref, Method(init="gaussian"), (5,)), expected, **EXACT)


def test_save_and_load(tiny, tiny_ref, tmp_path):
    ref = replace(tiny_ref, prompt="ein Kätzchen")
    save_reference(ref, tmp_path / "ref.safetensors", "abc")
    back = load_reference(tmp_path / "ref.safetensors", "abc")
    assert torch.equal(back.chain, ref.chain) and back.prompt == ref.prompt
    assert back.image.tobytes() == ref.image.tobytes() and back.image.size == ref.image.size


def test_a_reference_of_other_weights_is_refused(tiny_ref, tmp_path):
    save_reference(tiny_ref, tmp_path / "ref.safetensors", "abc")
    with pytest.raises(Problem, match="inverted with other weights.*invert the picture again"):
        load_reference(tmp_path / "ref.safetensors", "abd")


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_what_is_no_reference_is_refused(tmp_path, content):
    path = tmp_path / "ref.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Problem, match="ref.safetensors: "):
        load_reference(path, "abc")


def test_another_safetensors_file_is_no_reference(tmp_path):
    from conftest import DEMO
    with pytest.raises(Problem, match="not a reference; make one with: isadca invert"):
        load_reference(DEMO / "ip-adapter_demo.safetensors", "abc")


def test_the_reference_is_cropped_to_a_square(tiny):
    wide = Image.new("RGB", (32, 16), "black")
    wide.paste("white", (8, 0, 24, 16))
    assert invert(tiny, wide, steps=1).image.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("size", [0, 3, -16, 18])
def test_a_size_that_the_unet_cannot_halve_is_refused(tiny, tiny_ref, size):
    with pytest.raises(Problem, match="size is .* expected multiples of 4"):
        invert(tiny, tiny_ref.image, steps=1, size=size)
