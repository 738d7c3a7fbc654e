"""config.json -> dataclass: the published values are the defaults, and nothing wrong or unsupported gets through."""

import itertools
import json
import os

import pytest
import torch
from conftest import DEMO
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from keyfiles import told
from transformers import CLIPTextConfig as TheirText, CLIPVisionConfig as TheirVision

from isadca.common.problem import Problem
from isadca.ddim import Schedule, ScheduleConfig
from isadca.loading.config_json import read_config, read_schedule
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

CROSS_DOWN, CROSS_UP = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3

# what the files of Stable Diffusion 1.5 and of h94's image encoder say
SD15 = {
    UNetConfig: {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "cross_attention_dim": 768, "down_block_types": [*CROSS_DOWN, "DownBlock2D"], "downsample_padding": 1,
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", *CROSS_UP]},
    VAEConfig: {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
        "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4},
    CLIPTextConfig: {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
        "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 1, "torch_dtype": "float32", "vocab_size": 49408},
    CLIPVisionConfig: {
        "architectures": ["CLIPVisionModelWithProjection"], "attention_dropout": 0.0, "dropout": 0.0,
        "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120,
        "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3,
        "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024, "torch_dtype": "float16"},
    ScheduleConfig: {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False},
}
DEMO_FILES = {UNetConfig: "unet/config.json", VAEConfig: "vae/config.json", CLIPTextConfig: "text_encoder/config.json",
              CLIPVisionConfig: "image_encoder/config.json", ScheduleConfig: "scheduler/scheduler_config.json"}
NETWORKS = {UNetConfig: UNet, VAEConfig: VAE, CLIPTextConfig: CLIPText, CLIPVisionConfig: CLIPVision}


def read(cls, folder, content):
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return read_config(cls, path)


@pytest.mark.parametrize("cls", SD15)
def test_sd15s_own_files_are_the_defaults(tmp_path, cls):
    assert read(cls, tmp_path, SD15[cls]) == cls()
    assert read_config(cls, tmp_path / "absent.json") == cls()


def test_files_saved_again_by_todays_libraries_are_the_defaults(tmp_path):
    """Newer writers add dozens of keys; none of them may be taken for an unsupported setting."""
    given = {cls: {key: v for key, v in content.items() if not key.startswith("_") and key not in
                   ("torch_dtype", "clip_sample")} for cls, content in SD15.items()}
    with torch.device("meta"):
        saved = {cls: json.loads(theirs(**given[cls]).to_json_string()) for cls, theirs in
                 [(UNetConfig, UNet2DConditionModel), (VAEConfig, AutoencoderKL), (ScheduleConfig, PNDMScheduler)]}
    for cls, theirs in [(CLIPTextConfig, TheirText), (CLIPVisionConfig, TheirVision)]:
        saved[cls] = json.loads(theirs(**given[cls]).to_json_string(use_diff=False))
    assert all(len(saved[cls]) > len(SD15[cls]) for cls in (UNetConfig, VAEConfig))
    assert {cls: read(cls, tmp_path, content) for cls, content in saved.items()} == {cls: cls() for cls in SD15}


def test_demo_folder_gives_its_sizes():
    read_demo = {cls: read_config(cls, DEMO / name) for cls, name in DEMO_FILES.items()}
    unet, vae = read_demo[UNetConfig], read_demo[VAEConfig]
    assert (unet.channels, unet.attention, unet.n_heads) == ((64, 128, 168), (True, True, False), 4)
    assert (unet.layers_per_block, unet.context_dim, unet.norm_groups, unet.sample_size) == (1, 128, 8, 16)
    assert (vae.channels, vae.layers_per_block, vae.norm_groups, vae.downscale) == ((24, 48, 64), 1, 8, 4)
    assert vae.scaling_factor == 0.6541045791253615
    assert read_demo[CLIPTextConfig] == CLIPTextConfig(745, 128, 4, 4, 512, 32)
    assert read_demo[CLIPVisionConfig] == CLIPVisionConfig(128, 4, 4, 512, 64, 8, 128)


def test_projection_of_a_text_encoder_is_not_read_here(tmp_path):
    """CLIPTextModel's config also says projection_dim, but its file holds no text_projection: the weights decide,
    test_published_variants.py."""
    for says in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        config = SD15[CLIPTextConfig] | {"projection_dim": 640, "architectures": [says]}
        assert read(CLIPTextConfig, tmp_path, config).projection_dim is None


@pytest.mark.parametrize("cls, key, value", [
    (UNetConfig, "use_linear_projection", True), (UNetConfig, "in_channels", 9), (UNetConfig, "in_channels", 8),
    (UNetConfig, "out_channels", 8), (UNetConfig, "act_fn", "gelu"), (UNetConfig, "norm_eps", 1e-6),
    (UNetConfig, "addition_embed_type", "text_time"), (UNetConfig, "transformer_layers_per_block", [1, 2, 10]),
    (UNetConfig, "only_cross_attention", True), (UNetConfig, "flip_sin_to_cos", False),
    (UNetConfig, "class_embed_type", "projection"), (UNetConfig, "num_attention_heads", 8),
    (VAEConfig, "shift_factor", 0.1159), (VAEConfig, "latent_channels", 16), (VAEConfig, "use_quant_conv", False),
    (VAEConfig, "latents_mean", [0.0]), (CLIPTextConfig, "hidden_act", "relu"),
    (CLIPVisionConfig, "num_channels", 4), (CLIPVisionConfig, "hidden_act", "gelu_new"),
    (ScheduleConfig, "prediction_type", "v_prediction"), (ScheduleConfig, "prediction_type", "sample"),
    (ScheduleConfig, "rescale_betas_zero_snr", True), (ScheduleConfig, "trained_betas", [0.1]),
    (ScheduleConfig, "beta_schedule", "squaredcos_cap_v2"), (ScheduleConfig, "steps_offset", -1)])
def test_setting_that_changes_the_mathematics_is_refused(tmp_path, cls, key, value):
    told(lambda: read(cls, tmp_path, SD15[cls] | {key: value}), tmp_path / "config.json", f"{key} is {value!r}",
         "isadca computes", "only", "use a plain Stable Diffusion 1.x model")


OTHER_MODELS = {  # what their unet/config.json says differently
    "SD 2.1": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
               "only_cross_attention": False, "num_class_embeds": None, "sample_size": 96, "upcast_attention": True,
               "use_linear_projection": True},
    "SDXL": {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
             "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "sample_size": 128,
             "down_block_types": ["DownBlock2D", *CROSS_DOWN[:2]], "up_block_types": [*CROSS_UP[:2], "UpBlock2D"],
             "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
             "upcast_attention": None, "use_linear_projection": True},
    "inpainting": {"in_channels": 9}, "InstructPix2Pix": {"in_channels": 8},
    "image variations of SD 2": {"class_embed_type": "projection", "cross_attention_dim": 1024}}


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_config_of_another_model(tmp_path, model):
    told(lambda: read(UNetConfig, tmp_path, SD15[UNetConfig] | OTHER_MODELS[model]), tmp_path / "config.json",
         "isadca computes", "use a plain Stable Diffusion 1.x model")


@pytest.mark.parametrize("content, word", [
    ("", "Expecting value"), ("{", "Expecting property name"), ("[]", "it holds a list, not an object"),
    ("7", "it holds a int"), ("{'a': 1}", "Expecting property name"), (b"\xff\xfe{}".decode("latin1"), "Expecting")])
def test_broken_config(tmp_path, content, word):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    told(lambda: read_config(UNetConfig, path), path, "not a readable config", word, "copy it again")


def test_config_that_is_no_file(tmp_path):
    """It is not taken for absent, and a pipe is not waited for."""
    for make in (os.mkfifo, os.mkdir):
        path = tmp_path / f"{make.__name__}.json"
        make(path)
        told(lambda: read_config(UNetConfig, path), path, f"not a readable config ({path.name} is no regular file)")


def test_config_that_is_not_utf8(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"act_fn": "\xff"}')
    told(lambda: read_config(UNetConfig, path), path, "not a readable config", "utf-8", "copy it again")


@pytest.mark.parametrize("cls, change", [
    (UNetConfig, {"layers_per_block": "2"}), (UNetConfig, {"layers_per_block": [2, 2, 2, 3]}),
    (UNetConfig, {"cross_attention_dim": 768.0}), (UNetConfig, {"cross_attention_dim": True}),
    (UNetConfig, {"attention_head_dim": [5, 10, 20, 20]}), (UNetConfig, {"attention_head_dim": 0}),
    (UNetConfig, {"attention_head_dim": 7}), (UNetConfig, {"norm_num_groups": 0}),
    (UNetConfig, {"norm_num_groups": 24}), (UNetConfig, {"block_out_channels": 320}),
    (UNetConfig, {"block_out_channels": [320] * 9}),  # refused before it is built
    (UNetConfig, {"block_out_channels": []}), (UNetConfig, {"beta_start": 0.1, "attention_head_dim": -8}),
    (UNetConfig, {"block_out_channels": [320, 640, "1280", 1280]}), (UNetConfig, {"block_out_channels": [320] * 3}),
    (UNetConfig, {"block_out_channels": [320, 640, 1280, -1280]}), (UNetConfig, {"sample_size": None}),
    (VAEConfig, {"scaling_factor": "0.18215"}), (VAEConfig, {"scaling_factor": 0}),
    (VAEConfig, {"scaling_factor": float("nan")}), (VAEConfig, {"block_out_channels": [[128]]}),
    (CLIPTextConfig, {"num_attention_heads": 7}), (CLIPTextConfig, {"vocab_size": -1}),
    (CLIPVisionConfig, {"projection_dim": "768"}), (CLIPVisionConfig, {"patch_size": 0}),
    (CLIPVisionConfig, {"num_attention_heads": 0}),
    (ScheduleConfig, {"set_alpha_to_one": 0}), (ScheduleConfig, {"num_train_timesteps": 0}),
    (ScheduleConfig, {"beta_start": -0.1}), (ScheduleConfig, {"steps_offset": 0.0})])
def test_wrong_type_or_size(tmp_path, cls, change):
    told(lambda: read(cls, tmp_path, SD15[cls] | change), tmp_path / "config.json", "copy it again")


@pytest.mark.parametrize("key, value", [
    ("attention_head_dim", 8), ("layers_per_block", 2), ("cross_attention_dim", 768), ("only_cross_attention", False),
    ("transformer_layers_per_block", 1)])
def test_a_list_of_equal_values_is_that_value(tmp_path, key, value):
    """Where a value may be given for each level."""
    plain, listed = (read(UNetConfig, tmp_path, SD15[UNetConfig] | {key: given}) for given in (value, [value] * 4))
    assert plain == listed == UNetConfig()


def test_a_whole_clip_without_a_width_of_its_joint_space_has_the_librarys(tmp_path):
    assert read(CLIPVisionConfig, tmp_path, {"text_config": {}, "vision_config": {}}).projection_dim == 512


def test_levels_are_counted_before_they_are_built(tmp_path):
    """One is enough; more than any model has are refused, though their block types would fit."""
    assert read(VAEConfig, tmp_path, {"block_out_channels": [64]}).channels == (64,)
    nine = {"block_out_channels": [320] * 9, "down_block_types": ["CrossAttnDownBlock2D"] * 9,
            "up_block_types": ["CrossAttnUpBlock2D"] * 9}
    told(lambda: read(UNetConfig, tmp_path, nine), tmp_path / "config.json", "channels is", "expected a tuple")


def test_a_schedule_that_ends_in_pure_noise_is_refused(tmp_path):
    """At its last level nothing of the picture would be left to divide by."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"beta_end": 1.0}))
    path = tmp_path / "scheduler_config.json"
    told(lambda: read_schedule(path), path, "make no falling noise levels", "copy it again")


def test_steps_offset_zero_is_one_as_in_their_pipeline(tmp_path):
    """StableDiffusionPipeline rewrites a scheduler whose offset is 0: 0.8 % of the latent after ten steps."""
    config = read(ScheduleConfig, tmp_path, SD15[ScheduleConfig] | {"steps_offset": 0})
    assert Schedule(config).steps(50) == Schedule().steps(50)


@pytest.mark.parametrize("down, up", [
    ([*CROSS_DOWN, "AttnDownBlock2D"], ["UpBlock2D", *CROSS_UP]),
    ([*CROSS_DOWN, "DownBlock2D"], [*CROSS_UP, "UpBlock2D"]),
    ([*CROSS_DOWN, "DownBlock2D"], None), ([*CROSS_DOWN, "DownBlock2D"], CROSS_UP), ("CrossAttnDownBlock2D", CROSS_UP),
    ([["DownBlock2D"]], [["UpBlock2D"]]), (7, 7)])
def test_block_types_of_another_model(tmp_path, down, up):
    change = {"down_block_types": down, "up_block_types": up}
    told(lambda: read(UNetConfig, tmp_path, SD15[UNetConfig] | change), tmp_path / "config.json", "block types",
         "Stable Diffusion 1.x")


ODD = [None, True, False, 0, -1, 1, 3, 2.5, "x", [], [0], ["a"], [[1]], [64], [64] * 5, {}, float("nan")]


@pytest.mark.parametrize("cls", NETWORKS)
def test_no_value_of_any_key_ends_in_a_traceback(tmp_path, cls):
    """Each key, with each odd value: a network that can be built, or a Problem."""
    demo = json.loads((DEMO / DEMO_FILES[cls]).read_text())
    for key, value in itertools.product(SD15[cls], ODD):
        try:
            config = read(cls, tmp_path, demo | {key: value})
        except Problem as problem:
            assert "\n" not in str(problem)
        else:
            if config != read(cls, tmp_path, demo):
                with torch.device("meta"):
                    NETWORKS[cls](config)
