"""A ControlNet's residuals in the UNet: one added to each skip, the last to the middle, as in diffusers."""

import pytest
import torch
from twins import assert_near, diffusers_unet, rand, twin, unet_inputs


@pytest.fixture
def pair(tmp_path):
    theirs = diffusers_unet((16, 24, 32), (True, True, False))
    return theirs, twin(theirs, "unet", tmp_path)


def test_residuals_are_diffusers(pair):
    theirs, ours = pair
    z, t, context = unet_inputs(ours, (8, 12), torch.float64)
    shapes = []
    ours(z, t, context, edit=lambda h, place: shapes.append((place, h.shape)) or h)
    skips = {place: shape for place, shape in shapes if ".skips." in place}
    on_the_way_down = list(skips.values())[::-1]  # the way up reads the last one first
    middle = dict(shapes)["mid_block.resnets.1"]
    *down, mid = (rand(*shape, seed=i) for i, shape in enumerate([*on_the_way_down, middle]))
    expected = theirs(z, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert_near(ours(z, t, context, residuals=[*down, mid]), expected, 1e-10)
    assert (expected - ours(z, t, context)).abs().max() > 1e-2


def test_the_descent_numbers_its_layers_as_the_unet_does(pair):
    """What a ControlNet keeps of the UNet: down first, then the middle."""
    _, ours = pair
    from isadca.networks.unet import Descent
    sites = Descent(ours.config).sites
    assert sites == ours.sites[: len(sites)] and sites[-1].place == "mid"
