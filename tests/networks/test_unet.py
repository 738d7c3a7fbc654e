"""The UNet is diffusers' UNet2DConditionModel; `attend` and `edit` take part in it as documented."""

import re

import pytest
import torch
from twins import (
    BY_PRECISION,
    UNETS,
    assert_modules_agree,
    assert_near,
    assert_order_one,
    diffusers_unet,
    outputs,
    twin,
    unet_inputs,
)

from isadca.attention import attend, attend_reference, blend, by_kind, by_rows, capture, dca, isa


@pytest.mark.parametrize(**BY_PRECISION)
@pytest.mark.parametrize("arguments, hw", UNETS.values(), ids=UNETS)
def test_is_diffusers_unet(arguments, hw, dtype, atol, tmp_path):
    """Every module's output, in every block, with one time step per row."""
    theirs = diffusers_unet(**arguments)
    ours = twin(theirs, "unet", tmp_path, dtype)
    z, t, context = unet_inputs(ours, hw, dtype)
    with outputs(ours) as our_modules, outputs(theirs) as their_modules:
        eps, expected = ours(z, t, context), theirs(z, t, context).sample
    assert_order_one(expected)
    assert_near(eps, expected, atol)
    if dtype == torch.float64:
        assert {"time_embedding", "down_blocks.1", "mid_block", "up_blocks.0"} <= our_modules.keys()
        assert_modules_agree(our_modules, their_modules, atol)


@pytest.fixture
def pair(tmp_path):
    """A three-level UNet that attends on two levels: diffusers' and ours, float64."""
    theirs = diffusers_unet((16, 24, 32), (True, True, False))
    return theirs, twin(theirs, "unet", tmp_path)


@pytest.fixture
def unet(pair):
    return pair[1]


def test_the_written_out_kernel_gives_the_same_network(pair):
    theirs, ours = pair
    z, t, context = unet_inputs(ours, (8, 12), torch.float64)
    assert_near(ours(z, t, context, attend_reference), theirs(z, t, context).sample, 1e-10)


def test_one_time_step_serves_all_rows(pair):
    """An int, a 0-d tensor and a vector are the same time steps, and rows do not see each other."""
    theirs, ours = pair
    z, _, context = unet_inputs(ours, (8, 12), torch.float64)
    expected = theirs(z, 37, context).sample
    for t in (37, torch.tensor(37), torch.tensor([37, 37, 37])):
        assert_near(ours(z, t, context), expected, 1e-10)
    assert_near(ours(z[1:2], 37, context[1:2]), expected[1:2], 1e-10)


# ---- gradients and state -----------------------------------------------------------------------------------

def extra_kv(unet, z, context) -> dict:
    """Keys and values of other latents at every self site, random ones at every cross site."""
    store = {}
    unet(torch.randn_like(z[:1]), 500, context[:1], capture(store))
    heads = unet.config.n_heads
    for site in unet.sites:
        if site.kind == "cross":
            d = unet.get_submodule(site.name).to_q.out_features // heads
            store[site.name] = tuple(torch.randn(1, heads, 5, d, dtype=z.dtype) for _ in "kv")
    return store


def variants(kv: dict) -> dict:
    both = by_kind(isa(kv), dca(kv, 0.6))
    return {"plain": attend, "written out": attend_reference, "capture": capture({}), "append": isa(kv),
            "replace": isa(kv, "replace"), "dca": dca(kv), "both": both, "blend": blend(both, dca(kv), 0.3),
            "by_rows": by_rows(1, isa(kv), dca(kv))}


@pytest.mark.parametrize("name", ["plain", "written out", "both", "blend", "by_rows"])
def test_gradients_reach_the_latents_through_frozen_weights(unet, name):
    """Against a central difference along a random direction, turned towards the gradient so that it is large."""
    z, t, context = unet_inputs(unet, (4, 8), torch.float64, rows=2)
    attend_variant = variants(extra_kv(unet, z, context))[name]
    weight = torch.randn_like(z)

    def loss(x):
        return (unet(x, t, context, attend_variant) * weight).sum()
    leaf = z.clone().requires_grad_()
    loss(leaf).backward()
    direction = leaf.grad / leaf.grad.norm() + torch.randn_like(z) / z.numel() ** 0.5
    slope, h = (leaf.grad * direction).sum(), 1e-5
    difference = (loss(z + h * direction) - loss(z - h * direction)) / (2 * h)
    assert slope > 0.1
    assert slope.item() == pytest.approx(difference.item(), rel=1e-6)
    assert all(p.grad is None for p in unet.parameters())


def test_no_attend_leaves_a_trace(unet):
    """Weights and sites stay byte-identical, and so does the next plain call: no state is kept on modules."""
    def frozen():
        return ({key: tensor.numpy().tobytes() for key, tensor in unet.state_dict().items()},
                [(site, unet.get_submodule(site.name).site) for site in unet.sites])
    before = frozen()
    z, t, context = unet_inputs(unet, (4, 8), torch.float64)
    kv, plain = extra_kv(unet, z, context), unet(z, t, context)
    for name, attend_variant in variants(kv).items():
        changed = not torch.allclose(unet(z, t, context, attend_variant), plain)
        assert changed == (name not in ("plain", "written out", "capture")), name
        assert torch.equal(unet(z, t, context), plain), name
        assert frozen() == before, name


# ---- the text's keys and values, once per prompt ---------------------------------------------------------------

def test_keys_and_values_made_once_are_those_of_the_context(unet):
    z, t, context = unet_inputs(unet, (4, 8), torch.float64)
    kv = unet.keys_values(context)
    assert list(kv) == [site.name for site in unet.sites if site.kind == "cross"]
    assert torch.equal(unet(z, t, kv), unet(z, t, context))
    one = unet.keys_values(context[:1])
    assert_near(unet(z, t, one), unet(z, t, context[:1].expand(3, -1, -1)), 1e-12)  # a row for all


def test_made_once_they_are_not_projected_again(unet):
    z, t, context = unet_inputs(unet, (4, 8), torch.float64)
    with outputs(unet) as before:
        kv = unet.keys_values(context)
    with outputs(unet) as during:
        unet(z, t, kv)
    projected = {name for name in before if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(projected) == len(unet.sites) and not projected & during.keys()


# ---- edit ------------------------------------------------------------------------------------------------------

def test_an_edit_that_changes_nothing_changes_nothing(unet):
    z, t, context = unet_inputs(unet, (4, 8), torch.float64)
    assert torch.equal(unet(z, t, context, edit=lambda h, place: h), unet(z, t, context))


def expected_places(modules) -> list[str]:
    """Modules in the order in which they ran, each resnet of the way up after its skip."""
    found = []
    for name in modules:
        if resnet := re.fullmatch(r"(up_blocks\.\d)\.resnets\.(\d)", name):
            found.append(f"{resnet[1]}.skips.{resnet[2]}")
        if re.fullmatch(r"conv_in|.*\.(resnets|attentions|downsamplers|upsamplers)\.\d", name):
            found.append(name)
    return found


@pytest.mark.parametrize("arguments, hw", UNETS.values(), ids=UNETS)
def test_places_are_named_after_their_modules_and_are_their_outputs(arguments, hw, tmp_path):
    unet = twin(diffusers_unet(**arguments), "unet", tmp_path)
    z, t, context = unet_inputs(unet, hw, torch.float64)
    seen = {}
    with outputs(unet) as modules:
        unet(z, t, context, edit=lambda h, place: seen.setdefault(place, h))
    assert list(seen) == expected_places(modules)
    skips = [place for place in seen if ".skips." in place]
    assert all(torch.equal(h.flatten(), modules[place]) for place, h in seen.items() if place not in skips)
    down = [place for place in seen if place.startswith(("conv_in", "down_blocks"))]
    left = [place for place, after in zip(down, [*down[1:], ""]) if ".attentions." not in after]
    assert [id(seen[place]) for place in skips] == [id(seen[place]) for place in reversed(left)]


@pytest.mark.parametrize("place", ["conv_in", "down_blocks.0.attentions.0", "down_blocks.2.resnets.0",
                                   "down_blocks.1.downsamplers.0", "mid_block.attentions.0", "up_blocks.0.skips.1",
                                   "up_blocks.1.upsamplers.0", "up_blocks.2.attentions.1"])
def test_what_an_edit_returns_goes_on_in_the_activations_stead(unet, place):
    z, t, context = unet_inputs(unet, (4, 8), torch.float64)
    changed = unet(z, t, context, edit=lambda h, at: h.flip(1) if at == place else h)
    assert not torch.allclose(changed, unet(z, t, context), atol=1e-4)


def test_freeu_is_an_edit(pair):
    """arXiv 2309.11497 without its Fourier filter: the way up's first half of the channels scaled where it meets a
    skip, and the skip scaled. Against hooks on diffusers' own network."""
    theirs, ours = pair
    z, t, context = unet_inputs(ours, (8, 12), torch.float64)
    b, s = 1.4, 0.7

    def freeu(h, place):
        if place == "up_blocks.1.skips.0":
            return s * h
        if place == "up_blocks.0.upsamplers.0":
            return torch.cat([b * h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2:]], dim=1)
        return h

    def scale(module, inputs):
        [x, *rest], c = inputs, theirs.up_blocks[0].upsamplers[0].channels
        return (torch.cat([b * x[:, : c // 2], x[:, c // 2: c], s * x[:, c:]], dim=1), *rest)
    theirs.up_blocks[1].resnets[0].register_forward_pre_hook(scale)
    assert_near(ours(z, t, context, edit=freeu), theirs(z, t, context).sample, 1e-10)
