"""The networks at their published sizes compute what diffusers and transformers do with the same random weights.

The tiny twins of the other files have the same wiring; this is about what only size shows: the head counts and widths
of the defaults, and single precision through all layers.
"""

import os

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from keyfiles import listing
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection
from twins import assert_near, assert_order_one, load_adapter_into_diffusers, ours_of, random_state, shapes_of

from isadca.attention import dca
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

pytestmark = pytest.mark.slow  # 4.3 GB of memory, three minutes on two cores

ATOL = 1e-4  # float32, through a thousand million multiplications


@pytest.fixture
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def large_twins(make_theirs, make_ours, *args):
    """Both on the same tensors in memory, without a copy."""
    with torch.device("meta"):
        theirs, ours = make_theirs(*args).eval(), make_ours().eval()
    state = random_state(shapes_of(theirs))
    theirs.load_state_dict(state, assign=True)
    prefix = "text_model." if "embeddings.token_embedding.weight" in state else ""  # transformers 5 has none
    ours.load_state_dict({prefix + key: tensor for key, tensor in state.items()}, strict=True, assign=True)
    for module in theirs.modules():
        if hasattr(module, "position_ids"):  # a buffer that no file holds
            module.position_ids = torch.arange(module.position_ids.shape[1])[None]
    return theirs, ours


def test_unet_of_sd15_is_diffusers(all_cores):
    """Then with ip-adapter_sd15 in both."""
    theirs, ours = large_twins(lambda: UNet2DConditionModel(cross_attention_dim=768, sample_size=64), UNet)
    z, t, context = torch.randn(2, 4, 64, 48), torch.tensor([981, 21]), torch.randn(2, 77, 768)
    expected = theirs(z, t, context).sample
    assert_order_one(expected)
    assert_near(ours(z, t, context), expected, ATOL)

    file = random_state({key: shape for key, (_, shape) in listing("ip-adapter_sd15").items()}, seed=1)
    load_adapter_into_diffusers(theirs, file)
    adapter = ours_of(file, torch.float32)
    image = torch.randn(1, 1024)
    nothing = torch.zeros_like(image)
    kv = adapter.keys_values(adapter.tokens(image, nothing), ours.sites, ours.config.n_heads)
    embeds = torch.cat([nothing, image])[:, None]
    expected = theirs(z, t, context, added_cond_kwargs={"image_embeds": [embeds]}).sample
    assert_near(ours(z, t, context, dca(kv)), expected, ATOL)


def test_vae_of_sd15_is_diffusers(all_cores):
    sd15 = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    theirs, ours = large_twins(lambda: AutoencoderKL(**sd15), VAE)
    x = torch.rand(1, 3, 256, 192) * 2 - 1
    mean, logvar = ours.posterior(x)
    expected = theirs.encode(x).latent_dist
    assert_order_one(expected.mean)
    assert_near(mean, expected.mean, ATOL)
    assert_near(logvar, expected.logvar, ATOL)
    picture = theirs.decode(expected.mean).sample
    assert_order_one(picture)
    assert_near(ours.decode(expected.mean * 0.18215), picture, ATOL)


def test_text_encoder_of_sd15_is_transformers(all_cores):
    config = CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    theirs, ours = large_twins(CLIPTextModel, CLIPText, config)
    ids = torch.full((2, 77), 49407)
    ids[:, 0] = 49406
    ids[0, 1:9] = torch.randint(49406, (8,))
    expected = theirs(ids).last_hidden_state
    assert_order_one(expected)
    assert_near(ours(ids), expected, ATOL)


def test_image_encoder_of_ip_adapter_is_transformers(all_cores):
    config = CLIPVisionConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120,
                              patch_size=14, image_size=224, projection_dim=1024, hidden_act="gelu")
    theirs, ours = large_twins(CLIPVisionModelWithProjection, CLIPVision, config)
    pixels = torch.randn(2, 3, 224, 224)
    embeds, states = ours(pixels)
    expected = theirs(pixels, output_hidden_states=True)
    assert_order_one(expected.image_embeds)
    assert_near(embeds, expected.image_embeds, ATOL)
    assert_near(states, expected.hidden_states[-2], ATOL)
