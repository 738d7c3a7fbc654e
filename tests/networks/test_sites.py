"""The UNet's attention sites are named, numbered and called as documented."""

import pytest
import torch
from twins import diffusers_unet, outputs, twin, unet_inputs

from isadca.attention import Site, attend
from isadca.methods import PRESETS
from isadca.networks.sizes import UNetConfig
from isadca.networks.unet import UNet


@pytest.fixture(scope="module")
def sd15():
    """The UNet at SD1.5's sizes, without its weights' memory."""
    with torch.device("meta"):
        return UNet(UNetConfig())


def called_sites(unet, z, context) -> list[tuple[Site, torch.Tensor, torch.Tensor]]:
    calls = []

    def recording(q, k, v, site):
        calls.append((site, q, k))
        return attend(q, k, v, site)
    unet(z, torch.zeros(len(z), device=z.device, dtype=torch.long), context, recording)
    return calls


@pytest.fixture(scope="module")
def calls(sd15):
    return called_sites(sd15, torch.randn(2, 4, 64, 48, device="meta"), torch.randn(2, 77, 768, device="meta"))


def test_sd15_has_16_self_and_16_cross_sites(sd15):
    kinds = [site.kind for site in sd15.sites]
    assert kinds == ["self", "cross"] * 16
    assert len({site.name for site in sd15.sites}) == 32


def test_a_sites_name_is_its_checkpoint_prefix(sd15):
    keys = sd15.state_dict().keys()
    assert {key.removesuffix(".to_q.weight") for key in keys if key.endswith(".to_q.weight")} == {
        site.name for site in sd15.sites}
    for site in sd15.sites:
        assert site.name.endswith({"self": "attn1", "cross": "attn2"}[site.kind])
        assert site.name.startswith(site.place)


def test_sites_are_listed_and_numbered_in_the_order_of_execution(sd15, calls):
    """A registration order would put the middle block last."""
    executed = [site for site, _, _ in calls]
    assert [site._replace(hw=(0, 0)) for site in executed] == sd15.sites
    assert [site.layer for site in executed] == [i // 2 for i in range(32)]
    assert [site.place for site in executed] == ["down"] * 12 + ["mid"] * 2 + ["up"] * 18


def test_diffusers_attends_in_the_same_order(tmp_path):
    """The order, from hooks on diffusers' own attention modules."""
    theirs = diffusers_unet((8, 16, 16, 16), (True, True, True, False), layers=2, heads=2)
    ours = twin(theirs, "unet", tmp_path)
    z, t, context = unet_inputs(ours, (8, 8), torch.float64)
    with outputs(theirs) as modules:
        theirs(z, t, context)
    assert [name for name in modules if name.endswith((".attn1", ".attn2"))] == [site.name for site in ours.sites]
    assert {name.removesuffix(".processor") for name in theirs.attn_processors} == {site.name for site in ours.sites}


def test_a_site_tells_the_grid_of_its_queries(calls):
    grids = {"down_blocks.0": (64, 48), "down_blocks.1": (32, 24), "down_blocks.2": (16, 12), "mid_block": (8, 6),
             "up_blocks.1": (16, 12), "up_blocks.2": (32, 24), "up_blocks.3": (64, 48)}
    for site, q, k in calls:
        h, w = site.hw
        assert site.hw == grids[site.name.split(".attentions")[0]]
        assert q.shape[2] == h * w
        assert k.shape[2] == (h * w if site.kind == "self" else 77)


def test_masactrls_layers_are_the_two_finest_levels_on_the_way_up(sd15):
    """Its layers 10 to 15 are the last six in the order of execution, not of registration."""
    last = [s.layer for s in sd15.sites if s.kind == "self" and s.name.startswith(("up_blocks.2", "up_blocks.3"))]
    masactrl = PRESETS["masactrl"].check(1000, n_layers=16)
    assert masactrl.layers == tuple(last) == (10, 11, 12, 13, 14, 15)
