"""The autoencoder is diffusers' AutoencoderKL, in both directions."""

import pytest
import torch
from diffusers import AutoencoderKL
from twins import BY_PRECISION, assert_modules_agree, assert_near, assert_order_one, outputs, twin

from isadca.networks.sizes import VAEConfig
from isadca.networks.vae import VAE

SHAPES = {  # constructor arguments, and the picture's (H, W), oblong on purpose
    "two levels": (dict(block_out_channels=(16, 24), layers_per_block=1), (12, 20)),
    "as SD1.5": (dict(block_out_channels=(16, 24, 32, 32), layers_per_block=2), (40, 24)),
    "another scale": (dict(block_out_channels=(8, 16, 24), layers_per_block=1, scaling_factor=0.5), (8, 16)),
}


def diffusers_vae(block_out_channels: tuple, **settings):
    n = len(block_out_channels)
    return AutoencoderKL(block_out_channels=block_out_channels, norm_num_groups=4,
                         down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
                         **settings)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


@pytest.mark.parametrize(**BY_PRECISION)
def test_encodes_as_diffusers(shape, dtype, atol, tmp_path):
    """Every module of the encoder, the posterior's mean and log-variance, and the scale of z_0. A picture of random
    pixels and a border that matters: wrong padding shifts everything by half a cell."""
    arguments, hw = shape
    theirs = diffusers_vae(**arguments)
    ours = twin(theirs, "vae", tmp_path, dtype)
    x = torch.rand(2, 3, *hw, dtype=dtype) * 2 - 1
    with outputs(ours) as our_modules, outputs(theirs) as their_modules:
        (mean, logvar), expected = ours.posterior(x), theirs.encode(x).latent_dist
    assert_order_one(expected.mean)
    assert_near(mean, expected.mean, atol)
    assert_near(logvar, expected.logvar, atol)
    assert_near(ours.encode(x), expected.mode() * theirs.config.scaling_factor, atol)
    if dtype == torch.float64:
        assert {"encoder.down_blocks.0.downsamplers.0", "encoder.mid_block.attentions.0"} <= our_modules.keys()
        assert_modules_agree(our_modules, their_modules, atol)


@pytest.mark.parametrize(**BY_PRECISION)
def test_decodes_as_diffusers(shape, dtype, atol, tmp_path):
    arguments, (H, W) = shape
    theirs = diffusers_vae(**arguments)
    ours = twin(theirs, "vae", tmp_path, dtype)
    f = ours.config.downscale
    z = torch.randn(2, ours.config.latent_channels, H // f, W // f, dtype=dtype) * ours.config.scaling_factor
    with outputs(ours) as our_modules, outputs(theirs) as their_modules:
        x, expected = ours.decode(z), theirs.decode(z / theirs.config.scaling_factor).sample
    assert x.shape == (2, 3, H, W)
    assert_order_one(expected)
    assert_near(x, expected, atol)
    if dtype == torch.float64:
        assert_modules_agree(our_modules, their_modules, atol)


def test_log_variance_is_clamped_as_diffusers_does(tmp_path):
    """To [-30, 20]; only weights far from trained ones get there."""
    theirs = diffusers_vae((8, 16), layers_per_block=1)
    ours = twin(theirs, "vae", tmp_path)
    for model in (ours, theirs):
        model.quant_conv.weight.mul_(100)
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    mean, logvar = ours.posterior(x)
    assert (logvar.min(), logvar.max()) == (-30, 20)
    assert mean.abs().max() > 30
    assert_near(logvar, theirs.encode(x).latent_dist.logvar, 1e-10)


def test_defaults_are_sd15s():
    """Its config.json has no scaling_factor; 0.18215 is the one it was trained with. 8 pixels per cell."""
    assert (VAEConfig().scaling_factor, VAEConfig().downscale) == (0.18215, 8)
    with torch.device("meta"):
        vae = VAE()
    assert vae.encode(torch.zeros(1, 3, 512, 384, device="meta")).shape == (1, 4, 64, 48)
