"""Kandinsky's prior and its sampler against diffusers, with random weights in float64 and with the demo's own; and its
published files at full shape."""

import json
import shutil
from dataclasses import replace

import kandinsky_prior as prior
import pytest
import torch
from conftest import DEMO, ROOT
from diffusers import KandinskyV22PriorPipeline, PriorTransformer
from kandinsky import run_pipeline, unclip
from kandinsky_prior import load_prior
from keyfiles import listing, write_sparse
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig as TheirTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionConfig as TheirVisionConfig,
    CLIPVisionModelWithProjection,
)
from twins import rand, shake

import isadca
from isadca.app.evaluate import parse_systems
from isadca.common.images import clip_pixels
from isadca.common.problem import Problem
from isadca.evaluation import systems
from isadca.networks.clip import CLIPText
from isadca.networks.sizes import CLIPTextConfig
from isadca.networks.tokenizer import Tokenizer


SMALL = prior.PriorConfig(embed_dim=24, n_heads=2, head_dim=8, layers=3, max_tokens=32)


@pytest.fixture(scope="module")
def their_prior():
    return shake(PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=24,
                                  num_embeddings=32, additional_embeddings=4))


@pytest.fixture(scope="module")
def our_prior(their_prior):
    ours = prior.Prior(SMALL).double()
    ours.load_state_dict(their_prior.state_dict())
    return ours.requires_grad_(False)


def test_prior_equals_diffusers(our_prior, their_prior):
    """Rows of different lengths, so that both masks matter."""
    text = prior.TextCondition(rand(3, 32, 24), rand(3, 24, seed=1), torch.arange(32) < torch.tensor([[2], [9], [32]]))
    x = rand(3, 24, seed=2)
    for t in (0, 417, 999):
        expected = their_prior(x, t, text.embed, text.states, text.mask).predicted_image_embedding
        torch.testing.assert_close(our_prior(x, t, text), expected, rtol=0, atol=1e-10)


def test_published_prior_has_our_names():
    with torch.device("meta"):
        ours = {key: tuple(x.shape) for key, x in prior.Prior().state_dict().items()}
    assert ours == {key: shape for key, (_, shape) in listing("kandinsky22_prior").items()}


@pytest.mark.parametrize("steps", [2, 25, 50])
def test_unclip_equals_diffusers(steps):
    theirs = unclip()
    theirs.set_timesteps(steps)
    grid = prior.times(steps)
    assert grid == theirs.timesteps.tolist()
    for t, t_prev in zip(grid, [*grid[1:], -1]):
        x, x0 = rand(1, 8, seed=t), 20 * rand(1, 8, seed=t + 1)
        expected = theirs.step(x0, t, x, prev_timestep=None if t_prev < 0 else t_prev,
                               generator=torch.Generator().manual_seed(7)).prev_sample
        noise = torch.randn(1, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64) if t else None
        mine = prior.posterior_step(x, x0.clamp(-10, 10), t, t_prev, noise)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_the_whole_prior_pipeline(our_prior, their_prior):
    """A prompt to an embedding, with a small text encoder and the demo's tokenizer."""
    vocabulary = len(Tokenizer.from_folder(DEMO / "tokenizer", 32)._bpe.get_vocab())
    text = shake(CLIPTextModelWithProjection(TheirTextConfig(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, hidden_act="gelu", projection_dim=24, eos_token_id=vocabulary - 1)))
    vision = shake(CLIPVisionModelWithProjection(TheirVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=24)))
    tokenizer = CLIPTokenizerFast.from_pretrained(DEMO / "tokenizer", model_max_length=32)
    pipe = KandinskyV22PriorPipeline(their_prior, vision, text, tokenizer, unclip(), CLIPImageProcessor())
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    # the pipeline draws in the text encoder's dtype; ours in float32, then widened
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(1, 24, generator=generator).double() for _ in range(6)]
    expected = run_pipeline(pipe, "a cat on a red background", draws)

    encoder = CLIPText(CLIPTextConfig(vocabulary, 24, 2, 2, 48, 32, "gelu", projection_dim=24)).double()
    encoder.load_state_dict({k: v for k, v in text.state_dict().items() if "position_ids" not in k})
    mine = prior.embed_prompt(our_prior, encoder.requires_grad_(False), Tokenizer.from_folder(DEMO / "tokenizer", 32),
                              "a cat on a red background", steps=6, guidance=4.0, seed=3)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_the_prior_equals_the_pipeline():
    folder = DEMO / "prior"
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    vision = CLIPVisionModelWithProjection.from_pretrained(DEMO / "image_encoder")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer", model_max_length=32)
    pipe = KandinskyV22PriorPipeline(PriorTransformer.from_pretrained(folder / "prior"), vision, text, tokenizer,
                                     unclip(), CLIPImageProcessor())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = run_pipeline(pipe, "a cat on a red background",
                            [torch.randn(1, 128, generator=generator) for _ in range(6)])
    mine = prior.embed_prompt(*load_prior(folder), "a cat on a red background", steps=6, seed=3)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


def test_the_prior_knows_what_a_prompt_looks_like(demo):
    """Its embedding of "a N", the mean of four seeds, is nearest to that of a picture of an N."""
    parts, nouns = load_prior(DEMO / "prior"), ("apple", "cat", "pig", "rocket")
    seen = torch.cat([demo.vision(clip_pixels(isadca.load_image(DEMO / f"references/{noun}.png"), 64))[0]
                      for noun in nouns])
    told = torch.cat([sum(prior.embed_prompt(*parts, f"a {noun}", seed=seed) for seed in range(4)) for noun in nouns])
    similarity = torch.cosine_similarity(told[:, None], seen[None], dim=-1)
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_prior_loads_at_full_shape(tmp_path):
    """Beside its text encoder, whose file has no config.json in this test: one is written, as published."""
    write_sparse(tmp_path / "prior" / "diffusion_pytorch_model.safetensors", listing("kandinsky22_prior"))
    write_sparse(tmp_path / "text_encoder" / "model.safetensors", listing("kandinsky22_text_encoder_bigG"))
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(dict(
        architectures=["CLIPTextModelWithProjection"], hidden_size=1280, num_hidden_layers=32, num_attention_heads=20,
        intermediate_size=5120, hidden_act="gelu", projection_dim=1280, vocab_size=49408)))
    shutil.copytree(DEMO.parent / "tokenizer", tmp_path / "tokenizer")
    net, encoder, tokenizer = load_prior(tmp_path)
    assert net.config == prior.PriorConfig() and sum(p.numel() for p in net.parameters()) == 1_026_225_920
    assert encoder.config.projection_dim == 1280 and tokenizer(["a cat"]).shape == (1, 77)


def test_a_prior_and_a_text_encoder_of_different_models(tmp_path):
    write_sparse(tmp_path / "prior" / "diffusion_pytorch_model.safetensors", listing("kandinsky22_prior"))
    shutil.copytree(DEMO / "text_encoder_with_projection", tmp_path / "text_encoder")
    with pytest.raises(Problem, match="projects to 128, the prior reads 1280"):
        load_prior(tmp_path)
    (tmp_path / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    write_sparse(tmp_path / "prior" / "model.safetensors", listing("sd15_diffusers_unet"))
    with pytest.raises(Problem, match="holds unet, expected prior"):
        load_prior(tmp_path)


# ---- as a system -------------------------------------------------------------------------------------------------

def test_it_is_the_loop_with_another_image_prompt(demo, cat):
    [system] = parse_systems(f"{ROOT}/examples/counterparts/kandinsky_prior.py:SYSTEM")
    draw = systems.make_draw(system, demo, DEMO, 3)
    embeds = prior.embed_prompt(*load_prior(DEMO / "prior"), "a pig", seed=2)
    ref = isadca.invert(demo, cat, 3)
    [expected] = isadca.vary(demo, ref, "a pig", seeds=(2,), image_embeds=embeds)
    assert draw(cat, "a pig", 2).tobytes() == expected.tobytes() != draw(cat, "a pig", 3).tobytes()
    [without] = isadca.vary(demo, ref, "a pig", seeds=(2,))
    assert expected.tobytes() != without.tobytes()


def test_what_it_lacks_is_named(demo, tmp_path):
    with pytest.raises(Problem, match="has no prior in it or beside it.*weights/README.md"):
        systems.make_draw(prior.SYSTEM, demo, tmp_path, 3)
    (tmp_path / "prior").symlink_to(DEMO / "prior")
    with pytest.raises(Problem, match="128 wide.*vit-G"):
        systems.make_draw(prior.SYSTEM, replace(demo, ip_adapter=None), tmp_path, 3)
