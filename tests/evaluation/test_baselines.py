"""ControlNet, Kandinsky's prior and their samplers against diffusers, with the same random weights in float64."""

import numpy as np
import pytest
import theirs as diffusers_side
import torch
from conftest import DEMO
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    StableDiffusionImageVariationPipeline,
    UNet2DConditionModel,
)
from keyfiles import listing
from PIL import Image
from kandinsky import run_pipeline, unclip
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig as TheirTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionConfig as TheirVisionConfig,
    CLIPVisionModelWithProjection,
)

from isadca.evaluation import controlnet, image_variations, prior
from isadca.networks.clip import CLIPText
from isadca.networks.sizes import CLIPTextConfig, UNetConfig
from isadca.networks.tokenizer import Tokenizer
from isadca.networks.unet import UNet

torch.manual_seed(0)


def shake(net: nn.Module) -> nn.Module:
    """Random weights everywhere, in layers that start at zero or one as well."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = p.data.double() + 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net.double().eval().requires_grad_(False)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    ours = controlnet.ControlNet(CONFIG, (4, 6, 8, 10)).double()
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
        ours = {key: tuple(x.shape) for key, x in controlnet.ControlNet().state_dict().items()}
    assert ours == {key: shape for key, (_, shape) in listing("controlnet_sd15_diffusers").items()}


def test_residuals_for_the_text_half_alone():
    residuals = [rand(2, 3, 4, 4), rand(2, 5, 1, 1)]
    for both, one in zip(controlnet.on_text_half(residuals), residuals):
        assert torch.equal(both[:2], torch.zeros_like(one)) and torch.equal(both[2:], one)


@pytest.mark.parametrize("size", [(64, 64), (96, 40)])
def test_shuffled_content_is_the_same_stuff_elsewhere(size):
    """Same seed, same picture; another seed, another; a smooth picture stays one, and its colours stay in range."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([x, y, np.full_like(x, 40)], -1).astype(np.uint8))
    once, again, other = (controlnet.shuffle_content(picture, seed, cell=16) for seed in (0, 0, 1))
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
        np.testing.assert_allclose(controlnet.smooth_noise(rng, 96, 40, 16) * (side - 1), expected, atol=1e-3)
    for (row, column), place in OPENCV.items():
        assert (x[row, column], y[row, column]) == pytest.approx(place, abs=2e-3)


@pytest.mark.parametrize("seed", [5, 2**40 + 5])
def test_shuffle_reads_where_the_fields_say(seed):
    """Pixel by pixel: bilinear reading at 32nds of a pixel."""
    rng = np.random.default_rng(3)
    picture = Image.fromarray(rng.integers(0, 256, (20, 48, 3), np.uint8).repeat(2, 0).repeat(2, 1))
    moved, pixels = np.asarray(controlnet.shuffle_content(picture, seed, cell=16)), np.asarray(picture).astype(float)
    x, y = upstream_fields(5, 96, 40, 16)
    for row, column in [*OPENCV, *zip(range(40), range(0, 96, 2))]:
        u, v = round(x[row, column] * 32) / 32, round(y[row, column] * 32) / 32
        left, top = min(int(u), 94), min(int(v), 38)
        a, b = u - left, v - top
        expected = ((1 - b) * ((1 - a) * pixels[top, left] + a * pixels[top, left + 1])
                    + b * ((1 - a) * pixels[top + 1, left] + a * pixels[top + 1, left + 1]))
        np.testing.assert_allclose(moved[row, column], expected, atol=0.51)


# ---- the prior ---------------------------------------------------------------------------------------------------

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
def test_image_variations_equal_the_pipeline(demo, cat, guidance):
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
