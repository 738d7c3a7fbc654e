"""The networks together: what the calls between them run, and how often; how a model prints and travels."""

import pickle
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from PIL import Image
from twins import adapter_shapes, ours_of, outputs, random_state

from isadca.common.images import clip_pixels
from isadca.common.problem import Problem
from isadca.networks.model import Model

PICTURE = Image.effect_noise((20, 16), 80).convert("RGB")


@pytest.fixture(scope="module", params=["base", "plus", "full-face"])
def model(request) -> Model:
    """A tiny model with an adapter of each family; its encoder is 24 wide and projects to 20."""
    model = tiny_model()
    widths = [model.unet.get_submodule(s.name).to_q.out_features for s in model.unet.sites if s.kind == "cross"]
    adapter = ours_of(random_state(adapter_shapes(request.param, widths, embed=20, width=24)), torch.float64)
    return replace(model, ip_adapter=adapter)


def encoder_calls(model: Model, monkeypatch) -> list[torch.Tensor]:
    seen, forward = [], model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda pixels: seen.append(pixels) or forward(pixels))
    return seen


def features(model: Model, pixels: torch.Tensor) -> torch.Tensor:
    return model.vision(pixels.double())[1 if model.ip_adapter.reads_patches else 0]


def test_image_tokens_are_those_of_nothing_and_of_the_picture(model, monkeypatch):
    """Nothing is a zero embedding for the base family; for the others, an all-zero picture as the encoder sees it.
    The encoder runs once for what it is asked."""
    zero = torch.zeros(1, 3, 16, 16)
    picture = features(model, clip_pixels(PICTURE, 16))
    nothing = features(model, zero) if model.ip_adapter.reads_patches else torch.zeros_like(picture)
    expected = model.ip_adapter.image_proj(torch.cat([nothing, picture]))
    calls = encoder_calls(model, monkeypatch)
    torch.testing.assert_close(model.image_tokens(PICTURE), expected)
    assert len(calls) == (2 if model.ip_adapter.reads_patches else 1)
    calls.clear()
    torch.testing.assert_close(model.image_tokens(embeds=picture), expected)
    assert [x.count_nonzero() for x in calls] == ([0] if model.ip_adapter.reads_patches else [])


def test_embeds_of_another_shape_are_named(model):
    width = 24 if model.ip_adapter.reads_patches else 20
    right = (1, 5, width) if model.ip_adapter.reads_patches else (1, width)
    for shape in [(width,), (2, *right[1:]), (1, *right), (*right[:-1], width + 1), (0, *right[1:])]:
        with pytest.raises(Problem, match=rf"^image_embeds are \(.*, this IP-Adapter reads \(1, .*{width}\)$"):
            model.image_tokens(embeds=torch.zeros(shape))


def test_without_an_encoder_only_the_base_family_takes_embeds(model):
    blind = replace(model, vision=None)
    with pytest.raises(Problem, match="--image-encoder"):
        blind.image_tokens(PICTURE)
    if model.ip_adapter.reads_patches:
        with pytest.raises(Problem, match="--image-encoder"):
            blind.image_tokens(embeds=torch.zeros(1, 5, 24))
    else:
        assert blind.image_tokens(embeds=torch.zeros(1, 20)).shape == (2, 4, 24)


def test_a_model_prints_on_one_line(tiny):
    assert repr(tiny) == "<isadca.Model: 16 pixels, with an IP-Adapter, float64 on cpu>"
    assert repr(replace(tiny, ip_adapter=None)) == "<isadca.Model: 16 pixels, without an IP-Adapter, float64 on cpu>"


def test_a_models_parts_are_named_not_counted(tiny):
    with pytest.raises(TypeError, match="positional"):
        Model(tiny.unet, tiny.vae)


def test_a_model_can_be_sent_to_another_process(tiny):
    """multiprocessing pickles it; the other side computes the same."""
    z, context = torch.randn(1, 4, 8, 8, dtype=torch.float64), tiny.context(["a cat"])
    there = pickle.loads(pickle.dumps(tiny))
    assert torch.equal(there.context(["a cat"]), context)
    assert torch.equal(there.noise(z, 500, context), tiny.noise(z, 500, context))
    assert torch.equal(there.image_tokens(PICTURE), tiny.image_tokens(PICTURE))
    assert there.unet.sites == tiny.unet.sites


def test_noise_passes_both_functions_and_the_kept_keys_to_the_unet(tiny):
    z, context = torch.randn(1, 4, 8, 8, dtype=torch.float64), tiny.context(["a cat"])
    kv, places = tiny.unet.keys_values(context), []

    def edit(h, place):
        places.append(place)
        return h
    with outputs(tiny.unet) as modules:
        eps = tiny.noise(z, 500, kv, edit=edit)
    assert places[0] == "conv_in" and "up_blocks.0.skips.0" in places
    assert torch.equal(eps, tiny.noise(z, 500, context))
    assert not any(name.endswith("attn2.to_k") for name in modules)
