"""The other systems' published files: every layout at full shape, from sparse files, and files of other models."""

import json
import shutil

import pytest
from conftest import DEMO
from keyfiles import cast, ldm_pairs, listing, renamed, write_sparse

from isadca.common.problem import Problem
from isadca.evaluation import load_others as loading, prior
from isadca.loading.checkpoints import rename
from isadca.networks.sizes import UNetConfig

SMALL = UNetConfig(channels=(16, 32), attention=(True, False), norm_groups=8)


def test_controlnet_rules_are_the_published_pairs():
    pairs = {ldm.removeprefix("control_model."): ours for ldm, ours in ldm_pairs("controlnet").items()}
    assert len(pairs) == 340
    assert {ldm: rename(ldm, loading.CONTROLNET_RULES) for ldm in pairs} == pairs


@pytest.mark.parametrize("prefix", ["control_model.", "", None])
def test_every_controlnet_layout_loads_at_full_shape(prefix, tmp_path):
    """LDM with and without its prefix, and diffusers'; sparse files, so that nothing is really read."""
    tensors = listing("controlnet_sd15_diffusers") if prefix is None else listing("controlnet_sd15_ldm")
    if prefix == "":
        tensors = renamed(tensors, "control_model.", "")
    path = write_sparse(tmp_path / "control.safetensors", tensors)
    net = loading.load_controlnet(path)
    assert sum(p.numel() for p in net.parameters()) == 361_279_120


def test_files_that_are_not_a_controlnet(tmp_path):
    unet = write_sparse(tmp_path / "unet.safetensors", listing("sd15_diffusers_unet"))
    with pytest.raises(Problem, match="unet.safetensors: is not a ControlNet.*control_v11e_sd15_shuffle"):
        loading.load_controlnet(unet)
    tensors = listing("controlnet_sd15_ldm")
    del tensors["control_model.zero_convs.3.0.bias"]
    with pytest.raises(Problem, match="layout: LDM. does not fit: 1 missing: controlnet_down_blocks.3.bias"):
        loading.load_controlnet(write_sparse(tmp_path / "short.safetensors", tensors))
    with pytest.raises(Problem, match="does not fit"):
        loading.load_controlnet(write_sparse(tmp_path / "full.safetensors", listing("controlnet_sd15_ldm")), SMALL)


def test_the_prior_loads_at_full_shape(tmp_path):
    """Beside its text encoder, whose file has no config.json in this test: one is written, as published."""
    write_sparse(tmp_path / "prior" / "diffusion_pytorch_model.safetensors", listing("kandinsky22_prior"))
    write_sparse(tmp_path / "text_encoder" / "model.safetensors", listing("kandinsky22_text_encoder_bigG"))
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(dict(
        architectures=["CLIPTextModelWithProjection"], hidden_size=1280, num_hidden_layers=32, num_attention_heads=20,
        intermediate_size=5120, hidden_act="gelu", projection_dim=1280, vocab_size=49408)))
    shutil.copytree(DEMO.parent / "tokenizer", tmp_path / "tokenizer")
    net, encoder, tokenizer = loading.load_prior(tmp_path)
    assert net.config == prior.PriorConfig() and sum(p.numel() for p in net.parameters()) == 1_026_225_920
    assert encoder.config.projection_dim == 1280 and tokenizer(["a cat"]).shape == (1, 77)


def test_a_prior_and_a_text_encoder_of_different_models(tmp_path):
    write_sparse(tmp_path / "prior" / "diffusion_pytorch_model.safetensors", listing("kandinsky22_prior"))
    shutil.copytree(DEMO / "text_encoder_with_projection", tmp_path / "text_encoder")
    with pytest.raises(Problem, match="projects to 128, the prior reads 1280"):
        loading.load_prior(tmp_path)
    (tmp_path / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    write_sparse(tmp_path / "prior" / "model.safetensors", listing("sd15_diffusers_unet"))
    with pytest.raises(Problem, match="holds unet, expected prior"):
        loading.load_prior(tmp_path)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_image_variations_load_at_full_shape(dtype, tmp_path):
    files = {"unet": "sd15_diffusers_unet", "vae": "sd15_diffusers_vae_old_names",
             "image_encoder": "image_encoder_vit_l14_lambda"}
    for name, keys in files.items():
        write_sparse(tmp_path / name / "model.safetensors", cast(listing(keys), dtype))
    model = loading.load_image_variations(tmp_path)
    assert model.vision.config.projection_dim == model.unet.config.context_dim == 768 and model.text is None
    assert model.vision.config.act == "quick_gelu"


def test_an_image_encoder_of_another_model(tmp_path):
    for name, keys in {"unet": "sd15_diffusers_unet", "vae": "sd15_diffusers_vae_new_names",
                       "image_encoder": "image_encoder_vit_h"}.items():
        write_sparse(tmp_path / name / "model.safetensors", listing(keys))
    with pytest.raises(Problem, match="projects to 1024, the UNet expects 768"):
        loading.load_image_variations(tmp_path)
