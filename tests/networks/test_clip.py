"""The text and image encoders are transformers' CLIP models."""

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from twins import BY_PRECISION, assert_modules_agree, assert_near, assert_order_one, outputs, twin

VOCABULARY, LENGTH = 60, 12
START, END = VOCABULARY - 2, VOCABULARY - 1
TRANSFORMER = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56)
ACTS = ["quick_gelu", "gelu"]


def text_config(act: str = "quick_gelu", eos_token_id: int = END):
    return CLIPTextConfig(**TRANSFORMER, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, projection_dim=20,
                          hidden_act=act, bos_token_id=START, eos_token_id=eos_token_id, pad_token_id=END)


def vision_config(act: str = "gelu"):
    return CLIPVisionConfig(**TRANSFORMER, image_size=24, patch_size=8, projection_dim=20, hidden_act=act)


def prompts(*lengths: int):
    """Random words between start and end, padded with the end token."""
    ids = torch.full((len(lengths), LENGTH), END)
    for row, n in zip(ids, lengths):
        row[0], row[1: n + 1] = START, torch.randint(0, START, (n,))
    return ids


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(**BY_PRECISION)
def test_text_states_are_transformers(act, dtype, atol, tmp_path):
    """The context of Stable Diffusion: last hidden states after the final norm, padding included; and every layer."""
    theirs = CLIPTextModel(text_config(act))
    ours = twin(theirs, "text", tmp_path, dtype)
    ids = prompts(0, 4, LENGTH - 2)
    with outputs(ours) as our_modules, outputs(theirs) as their_modules:
        context, expected = ours(ids), theirs(ids)
    assert_order_one(expected.last_hidden_state)
    assert_near(context, expected.last_hidden_state, atol)
    if dtype == torch.float64:
        assert {f"encoder.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")} <= our_modules.keys()
        assert_modules_agree(our_modules, their_modules, atol, ignore=("", "text_model"))


def test_text_may_be_shorter_than_the_model_allows(tmp_path):
    theirs = CLIPTextModel(text_config())
    ours = twin(theirs, "text", tmp_path)
    ids = prompts(3, 3)[:, :6]
    assert_near(ours(ids), theirs(ids).last_hidden_state, 1e-10)


@pytest.mark.parametrize("eos_token_id", [END, 2], ids=["the vocabulary's last", "SD1.5's config: 2"])
@pytest.mark.parametrize(**BY_PRECISION)
def test_text_embedding_is_transformers(eos_token_id, dtype, atol, tmp_path):
    """`embed` is text_embeds: the state at the first end token, projected; also under the id 2 of old configs."""
    theirs = CLIPTextModelWithProjection(text_config(eos_token_id=eos_token_id))
    ours = twin(theirs, "text", tmp_path, dtype)
    ids = prompts(0, 4, LENGTH - 2)
    ids[1, 2] = 2  # the token that such a config takes for the end
    expected = theirs(ids)
    assert_order_one(expected.text_embeds)
    assert_near(ours.embed(ids), expected.text_embeds, atol)
    assert_near(ours(ids), expected.last_hidden_state, atol)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(**BY_PRECISION)
def test_image_embedding_and_patch_states_are_transformers(act, dtype, atol, tmp_path):
    """image_embeds, which base adapters read, and hidden_states[-2], which plus and full-face read."""
    theirs = CLIPVisionModelWithProjection(vision_config(act))
    ours = twin(theirs, "vision", tmp_path, dtype)
    pixels = torch.randn(2, 3, 24, 24, dtype=dtype)
    with outputs(ours) as our_modules, outputs(theirs) as their_modules:
        embeds, states = ours(pixels)
        expected = theirs(pixels, output_hidden_states=True)
    assert_order_one(expected.image_embeds)
    assert_near(embeds, expected.image_embeds, atol)
    assert_near(states, expected.hidden_states[-2], atol)
    assert (expected.hidden_states[-1] - states).abs().max() > 0.1  # the layer before the last is another one
    if dtype == torch.float64:
        assert_modules_agree(our_modules, their_modules, atol, ignore=("", "vision_model"))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_norms_take_their_eps_from_the_config(eps, tmp_path):
    config = vision_config()
    config.layer_norm_eps = eps
    theirs = CLIPVisionModelWithProjection(config)
    ours = twin(theirs, "vision", tmp_path)
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    assert_near(ours(pixels)[0], theirs(pixels).image_embeds, 1e-10)
