"""The counterparts, ControlNet Shuffle and SD image-variations: their networks, samplers and published files against
diffusers, with random weights in float64 and with the demo's own; and as systems of `isadca evaluate`."""

from dataclasses import replace

import controlnet_shuffle
import image_variations
import numpy as np
import pytest
import theirs as diffusers_side
import torch
from conftest import DEMO, ROOT
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImageVariationPipeline,
    UNet2DConditionModel,
)
from keyfiles import cast, ldm_pairs, listing, renamed, write_sparse
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from twins import rand, shake

import isadca
from isadca.app.evaluate import parse_systems
from isadca.common.problem import Problem
from isadca.evaluation.systems import lacks, make_draw
from isadca.loading.checkpoints import rename
from isadca.networks.sizes import UNetConfig
from isadca.networks.unet import UNet

torch.manual_seed(0)
COUNTERPARTS = {name: parse_systems(f"{ROOT}/examples/counterparts/{name}.py:SYSTEM")[0]
                for name in ("controlnet_shuffle", "image_variations")}
EACH = pytest.mark.parametrize("system", COUNTERPARTS.values(), ids=COUNTERPARTS)


def difference(a, b) -> int:
    return abs(np.asarray(a).astype(int) - np.asarray(b)).max()


def latents(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


# ---- ControlNet --------------------------------------------------------------------------------------------------

CONFIG = UNetConfig(channels=(16, 32), attention=(True, False), layers_per_block=2, n_heads=2, context_dim=24,
                    norm_groups=8)
THEIRS = dict(block_out_channels=(16, 32), layers_per_block=2, attention_head_dim=2, cross_attention_dim=24,
              norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))


@pytest.mark.parametrize("pooled", [False, True])
def test_controlnet_and_the_unet_with_its_residuals_equal_diffusers(pooled):
    """Residuals one by one, then the UNet's noise with them; hints at 8 pixels a cell."""
    theirs = shake(ControlNetModel(**THEIRS, conditioning_embedding_out_channels=(4, 6, 8, 10),
                                   global_pool_conditions=pooled))
    ours = controlnet_shuffle.ControlNet(CONFIG, (4, 6, 8, 10)).double()
    ours.load_state_dict(theirs.state_dict())
    z, context, hint = rand(2, 4, 8, 8), rand(2, 5, 24, seed=1), rand(2, 3, 64, 64, seed=2)
    residuals = ours(z, 301, context, hint, pooled)
    down, mid = theirs(z, 301, context, hint, return_dict=False)
    assert len(residuals) == len(down) + 1
    for mine, reference in zip(residuals, [*down, mid]):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)

    unet = shake(UNet2DConditionModel(**THEIRS, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    ours = UNet(CONFIG).double()
    ours.load_state_dict(unet.state_dict())
    expected = unet(z, 301, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    torch.testing.assert_close(ours(z, 301, context, residuals=residuals), expected, rtol=0, atol=1e-10)
    assert (ours(z, 301, context) - expected).abs().max() > 1e-3


def test_published_controlnet_has_our_names():
    with torch.device("meta"):
        ours = {key: tuple(x.shape) for key, x in controlnet_shuffle.ControlNet().state_dict().items()}
    assert ours == {key: shape for key, (_, shape) in listing("controlnet_sd15_diffusers").items()}


def test_residuals_for_the_text_half_alone():
    residuals = [rand(2, 3, 4, 4), rand(2, 5, 1, 1)]
    for both, one in zip(controlnet_shuffle.on_text_half(residuals), residuals):
        assert torch.equal(both[:2], torch.zeros_like(one)) and torch.equal(both[2:], one)


@pytest.mark.parametrize("size", [(64, 64), (96, 40)])
def test_shuffled_content_is_the_same_stuff_elsewhere(size):
    """Same seed, same picture; another seed, another; a smooth picture stays one, and its colours stay in range."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([x, y, np.full_like(x, 40)], -1).astype(np.uint8))
    once, again, other = (controlnet_shuffle.shuffle_content(picture, seed, cell=16) for seed in (0, 0, 1))
    assert once.tobytes() == again.tobytes() != other.tobytes() and once.size == picture.size
    moved = np.asarray(once).astype(int)
    assert (moved[..., 2] == 40).all()
    for channel in (0, 1):  # the fields reach both ends, so the picture's extreme colours are all still there
        assert moved[..., channel].min() < 4 and moved[..., channel].max() > 251


OPENCV = {(0, 0): (47.909, 27.703), (7, 31): (39.972, 34.303), (39, 95): (12.116, 23.585), (20, 60): (37.772, 0.356)}


def upstream_fields(seed: int, width: int, height: int, cell: int) -> list[np.ndarray]:
    """The places that ControlNet's annotator/shuffle reads, x and then y: NumPy's global generator, and bicubic
    enlarging, which torch and OpenCV compute alike."""
    np.random.seed(seed)
    fields = []
    for side in (width, height):
        coarse = np.random.uniform(low=0, high=1, size=(height // cell + 2, width // cell + 2, 1))
        large = torch.nn.functional.interpolate(torch.from_numpy(coarse[None, None, ..., 0]), mode="bicubic",
                                                size=(height + 2 * cell, width + 2 * cell))[0, 0].numpy()
        field = large[cell:cell + height, cell:cell + width]
        fields.append((field - field.min()) / (field.max() - field.min()) * (side - 1))
    return fields


def test_shuffle_fields_are_upstreams():
    """Against the formula, and against numbers of upstream's code with OpenCV 4.8.1."""
    x, y = upstream_fields(5, 96, 40, 16)
    rng = np.random.RandomState(5)
    for side, expected in ((96, x), (40, y)):
        np.testing.assert_allclose(controlnet_shuffle.smooth_noise(rng, 96, 40, 16) * (side - 1), expected, atol=1e-3)
    for (row, column), place in OPENCV.items():
        assert (x[row, column], y[row, column]) == pytest.approx(place, abs=2e-3)


@pytest.mark.parametrize("seed", [5, 2**40 + 5])
def test_shuffle_reads_where_the_fields_say(seed):
    """Pixel by pixel: bilinear reading at 32nds of a pixel."""
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (20, 48, 3), np.uint8).repeat(2, 0).repeat(2, 1))
    moved = np.asarray(controlnet_shuffle.shuffle_content(picture, seed, cell=16))
    pixels = np.asarray(picture).astype(float)
    x, y = upstream_fields(5, 96, 40, 16)
    for row, column in [*OPENCV, *zip(range(40), range(0, 96, 2))]:
        u, v = round(x[row, column] * 32) / 32, round(y[row, column] * 32) / 32
        left, top = min(int(u), 94), min(int(v), 38)
        a, b = u - left, v - top
        expected = ((1 - b) * ((1 - a) * pixels[top, left] + a * pixels[top, left + 1])
                    + b * ((1 - a) * pixels[top + 1, left] + a * pixels[top + 1, left + 1]))
        np.testing.assert_allclose(moved[row, column], expected, atol=0.51)


def test_controlnet_rules_are_the_published_pairs():
    pairs = {ldm.removeprefix("control_model."): ours for ldm, ours in ldm_pairs("controlnet").items()}
    assert len(pairs) == 340
    assert {ldm: rename(ldm, controlnet_shuffle.LDM_RULES) for ldm in pairs} == pairs


@pytest.mark.parametrize("prefix", ["control_model.", "", None])
def test_every_controlnet_layout_loads_at_full_shape(prefix, tmp_path):
    """LDM with and without its prefix, and diffusers'; sparse files, so that nothing is really read."""
    tensors = listing("controlnet_sd15_diffusers") if prefix is None else listing("controlnet_sd15_ldm")
    if prefix == "":
        tensors = renamed(tensors, "control_model.", "")
    path = write_sparse(tmp_path / "control.safetensors", tensors)
    net = controlnet_shuffle.load_controlnet(path)
    assert sum(p.numel() for p in net.parameters()) == 361_279_120


def test_files_that_are_not_a_controlnet(tmp_path):
    unet = write_sparse(tmp_path / "unet.safetensors", listing("sd15_diffusers_unet"))
    with pytest.raises(Problem, match="unet.safetensors: is not a ControlNet.*control_v11e_sd15_shuffle"):
        controlnet_shuffle.load_controlnet(unet)
    tensors = listing("controlnet_sd15_ldm")
    del tensors["control_model.zero_convs.3.0.bias"]
    with pytest.raises(Problem, match="layout: LDM. does not fit: 1 missing: controlnet_down_blocks.3.bias"):
        controlnet_shuffle.load_controlnet(write_sparse(tmp_path / "short.safetensors", tensors))
    full = write_sparse(tmp_path / "full.safetensors", listing("controlnet_sd15_ldm"))
    with pytest.raises(Problem, match="does not fit"):
        controlnet_shuffle.load_controlnet(full, CONFIG)


def test_controlnet_shuffle_equals_the_pipeline(demo, cat):
    """Residuals pooled, and on the conditional half alone, as diffusers has it for `global_pool_conditions`."""
    theirs = diffusers_side.load()
    net = ControlNetModel.from_pretrained(DEMO / "controlnet-shuffle")
    assert net.config.global_pool_conditions
    pipe = StableDiffusionControlNetPipeline(theirs.vae, theirs.text_encoder, theirs.tokenizer, theirs.unet, net,
                                             DDIMScheduler.from_config(theirs.scheduler().config), None, None,
                                             requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    hint = controlnet_shuffle.shuffle_content(cat, 3, cell=32)
    [expected] = pipe("a pig", hint, num_inference_steps=8, guidance_scale=7.0, latents=latents(3)).images
    net = controlnet_shuffle.load_controlnet(DEMO / "controlnet-shuffle", demo.unet.config)
    mine = controlnet_shuffle.restyle(demo, net, cat, "a pig", steps=8, seed=3)
    assert difference(mine, expected) <= 1
    plain = isadca.vary(demo, isadca.Reference(cat, torch.zeros(9, 4, 16, 16)), "a pig",
                        replace(isadca.PRESETS["plain"], guidance=7.0), seeds=(3,))[0]
    assert difference(mine, plain) > 20  # the hint matters


# ---- SD image-variations -----------------------------------------------------------------------------------------

def test_squashed_pixels_are_not_antialiased():
    """A wide picture of thin lines: neither cropped nor smoothed."""
    lines = np.zeros((40, 96, 3), np.uint8)
    lines[:, ::4] = 255
    x = image_variations.squash_pixels(Image.fromarray(lines), 32)
    assert x.shape == (1, 3, 32, 32)
    mean, std = image_variations.CLIP_MEAN[0], image_variations.CLIP_STD[0]
    row = (x[0, 0, 5] * std + mean).numpy()  # three columns to one: each falls on the middle one and reads it alone
    np.testing.assert_allclose(row, lines[0, 1::3, 0] / 255, atol=1e-5)


@pytest.mark.parametrize("guidance", [3.0, 1.5])
def test_image_variations_of_the_demos_networks_equal_the_pipeline(demo, cat, guidance):
    """The demo's networks in diffusers' pipeline: its CLIP width is the context's, as in the published model."""
    theirs = diffusers_side.load()
    scheduler = DDIMScheduler.from_config(theirs.scheduler().config)
    pipe = StableDiffusionImageVariationPipeline(theirs.vae, theirs.image_encoder, theirs.unet, scheduler, None,
                                                 CLIPImageProcessor(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64).float()
    pixels = image_variations.squash_pixels(cat, 64)
    [expected] = pipe(pixels, num_inference_steps=8, guidance_scale=guidance, latents=latents).images
    [mine] = image_variations.vary_image(demo, cat, steps=8, guidance=guidance, seeds=(4,))
    assert abs(np.asarray(mine).astype(int) - np.asarray(expected)).max() <= 1


def test_image_variations_of_several_seeds_are_those_made_alone(demo, cat):
    both = image_variations.vary_image(demo, cat, steps=3, seeds=(1, 2))
    alone = [image_variations.vary_image(demo, cat, steps=3, seeds=(seed,))[0] for seed in (1, 2)]
    for a, b in zip(both, alone):
        assert abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert np.asarray(both[0]).tobytes() != np.asarray(both[1]).tobytes()


def test_image_variations_equal_the_pipeline(cat):
    folder = DEMO / "image-variations"
    theirs = diffusers_side.load()
    pipe = StableDiffusionImageVariationPipeline(
        theirs.vae, CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder"),
        UNet2DConditionModel.from_pretrained(folder / "unet"), DDIMScheduler.from_config(theirs.scheduler().config),
        None, CLIPImageProcessor(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pixels = image_variations.squash_pixels(cat, 64)
    [expected] = pipe(pixels, num_inference_steps=8, guidance_scale=3.0, latents=latents(5)).images
    [mine] = image_variations.vary_image(image_variations.load_image_variations(folder), cat, steps=8, seeds=(5,))
    assert difference(mine, expected) <= 1


def test_half_precision_leaves_the_autoencoder_in_float32():
    """As in the core: it overflows in fp16."""
    model = image_variations.load_image_variations(DEMO / "image-variations", torch.float16)
    assert next(model.unet.parameters()).dtype == torch.float16 and next(model.vae.parameters()).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_image_variations_load_at_full_shape(dtype, tmp_path):
    files = {"unet": "sd15_diffusers_unet", "vae": "sd15_diffusers_vae_old_names",
             "image_encoder": "image_encoder_vit_l14_lambda"}
    for name, keys in files.items():
        write_sparse(tmp_path / name / "model.safetensors", cast(listing(keys), dtype))
    model = image_variations.load_image_variations(tmp_path)
    assert model.vision.config.projection_dim == model.unet.config.context_dim == 768 and model.text is None
    assert model.vision.config.act == "quick_gelu"


def test_an_image_encoder_of_another_model(tmp_path):
    for name, keys in {"unet": "sd15_diffusers_unet", "vae": "sd15_diffusers_vae_new_names",
                       "image_encoder": "image_encoder_vit_h"}.items():
        write_sparse(tmp_path / name / "model.safetensors", listing(keys))
    with pytest.raises(Problem, match="projects to 1024, the UNet expects 768"):
        image_variations.load_image_variations(tmp_path)


# ---- as systems ----------------------------------------------------------------------------------------------------

@EACH
def test_a_counterpart_draws_the_same_picture_from_a_seed(demo, cat, system):
    draw = make_draw(system, demo, DEMO, 3)
    once, again, other = (draw(cat, "a pig", seed) for seed in (1, 1, 2))
    assert once.size == (64, 64) and once.tobytes() == again.tobytes() != other.tobytes()
    assert not system.deterministic


@EACH
def test_what_a_counterpart_lacks_is_named(demo, tmp_path, system):
    assert lacks(system, demo, DEMO) == ""
    with pytest.raises(Problem, match=f"has no {system.name} in it or beside it.*weights/README.md"):
        make_draw(system, demo, tmp_path)


def test_image_variations_see_the_whole_picture(demo, cat):
    """Squashed, not cropped: what is left and right of the centre counts."""
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste(cat, (32, 0))
    draw = make_draw(COUNTERPARTS["image_variations"], demo, DEMO, 3)
    assert draw(wide, "", 0).tobytes() != draw(cat, "", 0).tobytes()
    assert draw(wide, "", 0).tobytes() == draw(wide.resize((128, 64)), "", 0).tobytes()
