"""IP-Adapter files in the published layout: the image projections are diffusers', and decoupled cross-attention
through the whole UNet is what diffusers computes with the same file."""

import pytest
import torch
from keyfiles import listing
from twins import (
    BY_PRECISION,
    CONTEXT,
    EMBED,
    UNETS,
    WIDTH,
    adapter_shapes,
    assert_near,
    assert_order_one,
    diffusers_unet,
    load_adapter_into_diffusers,
    ours_of,
    random_state,
    shapes_of,
    twin,
    unet_inputs,
)

from isadca.attention import attend_reference, by_kind, dca, isa
from isadca.networks.ip_adapter import IPAdapter


def published_file(variant: str, unet) -> dict[str, torch.Tensor]:
    """A file for diffusers' `unet`: odd numbers along its attention processors, which is how they were trained."""
    cross = [name.removesuffix(".processor") for name in unet.attn_processors if ".attn2." in name]
    widths = [unet.get_submodule(name).to_q.out_features for name in cross]
    return random_state(adapter_shapes(variant, widths), seed=1)


def features(variant: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the image encoder says of a picture, and of no picture: one row each."""
    if variant == "base":
        embeds = torch.randn(1, EMBED, dtype=dtype)
        return embeds, torch.zeros_like(embeds)
    return torch.randn(2, 1, 10, WIDTH, dtype=dtype).unbind()


@pytest.fixture(params=["base", "plus", "full-face"])
def variant(request):
    return request.param


@pytest.mark.parametrize(**BY_PRECISION)
@pytest.mark.parametrize("arguments, hw", [UNETS["two levels"], UNETS["as SD1.5"]], ids=["two levels", "as SD1.5"])
def test_decoupled_cross_attention_is_diffusers(variant, arguments, hw, dtype, atol, tmp_path):
    """One file in both: the image tokens, and the noise of four rows in two guidance halves, [none, none, image,
    image]. A wrong numbering of the layers shows even where two neighbours have the same width."""
    theirs = diffusers_unet(**arguments)
    unet = twin(theirs, "unet", tmp_path, dtype)
    file = published_file(variant, theirs)
    load_adapter_into_diffusers(theirs, file, scale=0.6)
    adapter = ours_of(file, dtype)
    image, nothing = features(variant, dtype)

    tokens = adapter.tokens(image, nothing)
    [project] = theirs.encoder_hid_proj.image_projection_layers
    expected_tokens = project(torch.cat([nothing, image]))
    assert_order_one(expected_tokens)
    assert_near(tokens, expected_tokens.reshape(tokens.shape), atol, "the image tokens")

    z, _, context = unet_inputs(unet, hw, dtype, rows=2)
    z, context, t = z.repeat(2, 1, 1, 1), context.repeat(2, 1, 1), torch.tensor([981, 1, 981, 1])
    kv = adapter.keys_values(tokens, unet.sites, unet.config.n_heads)
    embeds = torch.cat([nothing, image]).repeat_interleave(2, 0)[:, None]
    expected = theirs(z, t, context, added_cond_kwargs={"image_embeds": [embeds]}).sample
    assert_order_one(expected)
    assert_near(unet(z, t, context, dca(kv, 0.6)), expected, atol)
    assert (unet(z, t, context) - expected).abs().max() > 0.01  # the image branch matters here


def test_scale_zero_is_the_unet_without_the_adapter(variant, tmp_path):
    theirs = diffusers_unet((16, 32), (True, True))
    unet = twin(theirs, "unet", tmp_path)
    adapter = ours_of(published_file(variant, theirs), torch.float64)
    kv = adapter.keys_values(adapter.tokens(*features(variant, torch.float64)), unet.sites, unet.config.n_heads)
    z, t, context = unet_inputs(unet, (4, 6), torch.float64, rows=2)
    assert torch.equal(unet(z, t, context, dca(kv, 0)), unet(z, t, context))


def test_the_image_branch_composes_with_intra_image_attention(tmp_path):
    """Both at once, against diffusers with its adapter and a self-attention whose reference is the row itself: to
    append a copy of one's own keys changes nothing."""
    theirs = diffusers_unet((16, 32), (True, True))
    unet = twin(theirs, "unet", tmp_path)
    file = published_file("base", theirs)
    load_adapter_into_diffusers(theirs, file, scale=1.0)
    adapter, (image, nothing) = ours_of(file, torch.float64), features("base", torch.float64)
    kv = adapter.keys_values(adapter.tokens(image, nothing)[1:], unet.sites, unet.config.n_heads)

    def own_keys_again(q, k, v, site):
        return isa({site.name: (k, v)})(q, k, v, site)
    z, t, context = unet_inputs(unet, (4, 6), torch.float64, rows=2)
    expected = theirs(z, t, context, added_cond_kwargs={"image_embeds": [image.expand(2, 1, EMBED)]}).sample
    both = by_kind(own_keys_again, dca(kv, kernel=attend_reference))
    assert_near(unet(z, t, context, both), expected, 1e-10)


def test_number_of_tokens_is_read_off_the_file():
    """diffusers takes 4 for granted."""
    shapes = adapter_shapes("base", [])
    shapes |= {"image_proj.proj.weight": (6 * CONTEXT, EMBED), "image_proj.proj.bias": (6 * CONTEXT,)}
    adapter = ours_of(random_state(shapes), torch.float64)
    image, nothing = features("base", torch.float64)
    assert adapter.tokens(image, nothing).shape == (2, 6, CONTEXT)


def test_no_picture_is_not_no_tokens():
    """The base projection of the zero embedding is what the adapter was trained with: every token is LN(bias)."""
    file = random_state(adapter_shapes("base", []))
    adapter = ours_of(file, torch.float64)
    image, nothing = features("base", torch.float64)
    bias = file["image_proj.proj.bias"].double().view(4, CONTEXT)
    gain, shift = (file[f"image_proj.norm.{x}"].double() for x in ("weight", "bias"))
    normed = (bias - bias.mean(1, keepdim=True)) / (bias.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert_near(adapter.tokens(image, nothing)[0], normed * gain + shift, 1e-12)


# ---- the published files -----------------------------------------------------------------------------------

SIZES = dict(context=768, width=1280, dim=768, queries=16, heads=12)
# cross-attention widths in the order of the files' numbers: down, up, mid
WIDTHS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]


@pytest.mark.parametrize("file, variant, embed, tokens", [
    ("ip-adapter_sd15", "base", 1024, 4), ("ip-adapter_sd15_vit-G", "base", 1280, 4),
    ("ip-adapter-plus_sd15", "plus", 1280, 16), ("ip-adapter-full-face_sd15", "full-face", 1280, 257)])
def test_an_adapter_takes_exactly_the_published_tensors(file, variant, embed, tokens):
    """Every key and shape, and the number of image tokens that comes out; the small files above are laid out alike."""
    shapes = {key: shape for key, (_, shape) in listing(file).items()}
    assert adapter_shapes(variant, WIDTHS, embed=embed, **SIZES) == shapes
    with torch.device("meta"):
        adapter, features = IPAdapter(shapes), torch.empty((1, embed) if variant == "base" else (1, 257, embed))
    assert shapes_of(adapter) == shapes
    assert (adapter.embed_dim, adapter.context_dim, adapter.reads_patches) == (embed, 768, variant != "base")
    assert adapter.tokens(features, features).shape == (2, tokens, 768)
