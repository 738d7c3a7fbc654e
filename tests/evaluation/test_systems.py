"""The other systems with the demo's own trained networks against diffusers' pipelines, to a grey level; and the list of
systems that `isadca evaluate` chooses from."""

from dataclasses import replace

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
    StableDiffusionControlNetPipeline,
    StableDiffusionImageVariationPipeline,
    UNet2DConditionModel,
)
from kandinsky import run_pipeline, unclip
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionModelWithProjection,
)

import isadca
from isadca.app import cli
from isadca.common.images import clip_pixels
from isadca.common.problem import Problem
from isadca.evaluation import controlnet, load_others as loading, prior, systems
from isadca.evaluation.image_variations import squash_pixels, vary_image
from isadca.evaluation.system_values import system_of


def difference(a, b) -> int:
    return abs(np.asarray(a).astype(int) - np.asarray(b)).max()


def latents(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


# ---- whole pipelines on the trained weights ------------------------------------------------------------------------

def test_controlnet_shuffle_equals_the_pipeline(demo, cat):
    """Residuals pooled, and on the conditional half alone, as diffusers has it for `global_pool_conditions`."""
    theirs = diffusers_side.load()
    net = ControlNetModel.from_pretrained(DEMO / "controlnet-shuffle")
    assert net.config.global_pool_conditions
    pipe = StableDiffusionControlNetPipeline(theirs.vae, theirs.text_encoder, theirs.tokenizer, theirs.unet, net,
                                             DDIMScheduler.from_config(theirs.scheduler().config), None, None,
                                             requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    hint = controlnet.shuffle_content(cat, 3, cell=32)
    [expected] = pipe("a pig", hint, num_inference_steps=8, guidance_scale=7.0, latents=latents(3)).images
    net = loading.load_controlnet(DEMO / "controlnet-shuffle", demo.unet.config)
    mine = controlnet.restyle(demo, net, cat, "a pig", steps=8, seed=3)
    assert difference(mine, expected) <= 1
    plain = isadca.vary(demo, isadca.Reference(cat, torch.zeros(9, 4, 16, 16)), "a pig",
                        replace(isadca.PRESETS["plain"], guidance=7.0), seeds=(3,))[0]
    assert difference(mine, plain) > 20  # the hint matters


def test_image_variations_equal_the_pipeline(cat):
    folder = DEMO / "image-variations"
    theirs = diffusers_side.load()
    pipe = StableDiffusionImageVariationPipeline(
        theirs.vae, CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder"),
        UNet2DConditionModel.from_pretrained(folder / "unet"), DDIMScheduler.from_config(theirs.scheduler().config),
        None, CLIPImageProcessor(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    [expected] = pipe(squash_pixels(cat, 64), num_inference_steps=8, guidance_scale=3.0, latents=latents(5)).images
    [mine] = vary_image(loading.load_image_variations(folder), cat, steps=8, seeds=(5,))
    assert difference(mine, expected) <= 1


def test_the_prior_equals_the_pipeline():
    folder = DEMO / "prior"
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    vision = CLIPVisionModelWithProjection.from_pretrained(DEMO / "image_encoder")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer", model_max_length=32)
    pipe = KandinskyV22PriorPipeline(PriorTransformer.from_pretrained(folder / "prior"), vision, text, tokenizer,
                                     unclip(), CLIPImageProcessor())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = run_pipeline(pipe, "a cat on a red background",
                            [torch.randn(1, 128, generator=generator) for _ in range(6)])
    mine = prior.embed_prompt(*loading.load_prior(folder), "a cat on a red background", steps=6, seed=3)
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


def test_the_prior_knows_what_a_prompt_looks_like(demo):
    """Its embedding of "a N", the mean of four seeds, is nearest to that of a picture of an N."""
    parts, nouns = loading.load_prior(DEMO / "prior"), ("apple", "cat", "pig", "rocket")
    seen = torch.cat([demo.vision(clip_pixels(isadca.load_image(DEMO / f"references/{noun}.png"), 64))[0]
                      for noun in nouns])
    told = torch.cat([sum(prior.embed_prompt(*parts, f"a {noun}", seed=seed) for seed in range(4)) for noun in nouns])
    similarity = torch.cosine_similarity(told[:, None], seen[None], dim=-1)
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]


# ---- the list ----------------------------------------------------------------------------------------------------

def draws(name, model, weights, steps=3):
    return systems.make_draw(system_of(name), model, weights, steps)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_system_draws_the_same_picture_from_a_seed(demo, cat, name):
    draw = draws(name, demo, DEMO)
    once, again, other = (draw(cat, "a pig", seed) for seed in (1, 1, 2))
    assert once.size == (64, 64) and once.tobytes() == again.tobytes()
    assert (once.tobytes() == other.tobytes()) == systems.SYSTEMS[name].deterministic


def test_the_systems_are_the_loop_with_their_methods(demo, cat):
    ref = isadca.invert(demo, cat, 3)
    for name, method in {"rival": isadca.PRESETS["rival"], "isadca-attention": isadca.Method(mix="attention"),
                         "ip-adapter": replace(isadca.PRESETS["ip-adapter"], guidance=7.0)}.items():
        [expected] = isadca.vary(demo, ref, "a pig", method, (4,))
        assert draws(name, demo, DEMO)(cat, "a pig", 4).tobytes() == expected.tobytes(), name


def test_image_variations_see_the_whole_picture(demo, cat):
    """Squashed, not cropped: what is left and right of the centre counts."""
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste(cat, (32, 0))
    draw = draws("image-variations", demo, DEMO)
    assert draw(wide, "", 0).tobytes() != draw(cat, "", 0).tobytes()
    assert draw(wide, "", 0).tobytes() == draw(wide.resize((128, 64)), "", 0).tobytes()


def test_what_is_missing_is_named(demo, tmp_path):
    lacking = {name: systems.lacks(system, replace(demo, ip_adapter=None), tmp_path)
               for name, system in systems.SYSTEMS.items()}
    assert [name for name, why in lacking.items() if not why] == ["rival"]
    assert lacking["isadca"] == "has no IP-Adapter" and lacking["isadca-prior"].startswith("has no prior in it")
    assert systems.lacks(systems.SYSTEMS["isadca-prior"], replace(demo, ip_adapter=None), DEMO) == "has no IP-Adapter"
    assert not any(systems.lacks(system, demo, DEMO) for system in systems.SYSTEMS.values())
    with pytest.raises(Problem, match="has no controlnet-shuffle in it or beside it.*weights/README.md"):
        draws("controlnet-shuffle", demo, tmp_path)
    with pytest.raises(Problem, match="system is 'dalle', expected one of rival, ip-adapter"):
        system_of("dalle")


def test_a_prior_of_another_width_asks_for_its_adapter(demo, tmp_path):
    (tmp_path / "prior").symlink_to(DEMO / "prior")
    with pytest.raises(Problem, match="128 wide.*vit-G"):
        draws("isadca-prior", replace(demo, ip_adapter=None), tmp_path)


# ---- vary --prior ------------------------------------------------------------------------------------------------

def test_vary_with_the_prior(demo, cat, tmp_path, capsys):
    """The image branch sees what the prior expects of the prompt; the recipe knows the prior and makes it again."""
    flags = ["-q", "--steps", "3", "--seed", "2"]
    picture = tmp_path / "a.png"
    assert cli.main(["vary", str(DEMO / "references/cat.png"), "a pig", "-o", str(picture), *flags,
                     "--prior", str(DEMO / "prior")]) == 0
    embeds = prior.embed_prompt(*loading.load_prior(DEMO / "prior"), "a pig", seed=2)
    [expected] = isadca.vary(demo, isadca.invert(demo, cat, 3), "a pig", seeds=(2,), image_embeds=embeds)
    assert isadca.load_image(picture).tobytes() == expected.tobytes()
    [without] = isadca.vary(demo, isadca.invert(demo, cat, 3), "a pig", seeds=(2,))
    assert expected.tobytes() != without.tobytes()
    assert cli.main(["vary", "-q", "--recipe", str(picture), "-o", str(tmp_path / "b.png")]) == 0
    assert isadca.load_image(tmp_path / "b.png").tobytes() == expected.tobytes()
    capsys.readouterr()
    assert cli.main(["vary", str(picture), "a pig", "-o", str(picture), *flags, "--prior", str(tmp_path)]) == 2
    assert "prior" in capsys.readouterr().err


def test_half_precision_leaves_the_autoencoder_in_float32():
    """As in the core: it overflows in fp16."""
    model = loading.load_image_variations(DEMO / "image-variations", torch.float16)
    assert next(model.unet.parameters()).dtype == torch.float16 and next(model.vae.parameters()).dtype == torch.float32
