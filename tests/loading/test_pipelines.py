"""Without ISA the method is a pipeline that diffusers has: the same pictures from the same z_T, weights and prompts."""

from dataclasses import replace

import numpy as np
import pytest
import theirs as diffusers_side
import torch
from tolerances import CHAIN
from torch.testing import assert_close

import isadca
from isadca import Method, Reference, Run
from isadca.reference import initial_latents

PROMPT, NEGATIVE = "a lemon, soft, on a blue background", "stripes, flat"
DCA = Method(lam=0.0, init="random")


@pytest.fixture(scope="module")
def theirs():
    return diffusers_side.load()


@pytest.fixture(scope="module")
def theirs64():
    return diffusers_side.load(torch.float64)


@pytest.fixture(scope="module")
def plain_pipeline(theirs):
    return diffusers_side.pipeline(theirs, adapter=False)


@pytest.fixture(scope="module")
def adapter_pipeline():
    return diffusers_side.pipeline(diffusers_side.load(), adapter=True)


@pytest.fixture(scope="module")
def no_adapter():
    return isadca.load(diffusers_side.DEMO, ip_adapter="none", device="cpu", dtype="fp32")


def placeholder(image, steps: int) -> Reference:
    """A reference whose chain nothing may look at: λ = 0 and a random z_T need its picture and length alone."""
    return Reference(image, torch.full((steps + 1, 4, 16, 16), float("nan")))


def their_picture(pipe, ref, run, **more) -> np.ndarray:
    latents = initial_latents(ref, run.method, run.seeds)
    pictures = pipe(run.prompt, negative_prompt=run.negative, num_inference_steps=ref.steps,
                    guidance_scale=run.method.guidance, latents=latents, output_type="np", **more)
    return pictures.images[0] * 255


def image_prompt(theirs, image, guided: bool) -> dict:
    embeds = theirs.embed(image)[None]
    return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(embeds), embeds]) if guided else embeds]}


def assert_same_picture(ours, theirs: np.ndarray) -> None:
    assert theirs.std() > 20  # a flat or saturated picture would prove nothing
    assert np.abs(np.asarray(ours, dtype=float) - theirs.round()).max() <= 1


@pytest.mark.parametrize("changes, negative, steps", [
    ({"mix": "noise"}, "", 50), ({"mix": "attention"}, "", 8), ({"mix": "noise"}, NEGATIVE, 8),
    ({"mix": "noise", "ip_scale": 0.6}, "", 8), ({"mix": "attention", "ip_scale": 0.6}, NEGATIVE, 8),
    ({"mix": "noise", "guidance": 1.0}, "", 8), ({"mix": "attention", "guidance": 1.0}, "", 8)], ids=str)
def test_lambda_0_is_diffusers_ip_adapter(demo, cat, theirs, adapter_pipeline, changes, negative, steps):
    run = Run(PROMPT, replace(DCA, **changes), negative=negative)
    ref = placeholder(cat, steps)
    adapter_pipeline.set_ip_adapter_scale(run.method.ip_scale)
    expected = their_picture(adapter_pipeline, ref, run, **image_prompt(theirs, cat, run.method.guidance != 1))
    [z] = isadca.sample(demo, ref, [run])
    assert_same_picture(isadca.decode(demo, z)[0], expected)


@pytest.mark.parametrize("guidance", [7.0, 1.0])
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_without_adapter_lambda_0_is_stable_diffusion(no_adapter, cat, plain_pipeline, guidance, negative):
    run = Run(PROMPT, replace(DCA, ip_scale=0.0, guidance=guidance), negative=negative)
    ref = placeholder(cat, 8)
    [z] = isadca.sample(no_adapter, ref, [run])
    assert_same_picture(isadca.decode(no_adapter, z)[0], their_picture(plain_pipeline, ref, run))


def test_the_choices_above_show_in_the_picture(demo, cat):
    """Each setting that is compared with diffusers changes the picture, so that a forgotten one would be seen."""
    ref = placeholder(cat, 4)
    runs = [Run(PROMPT, DCA), Run(PROMPT, DCA, negative=NEGATIVE), Run(PROMPT, replace(DCA, guidance=1.0)),
            Run(PROMPT, replace(DCA, ip_scale=0.6)), Run(PROMPT, replace(DCA, ip_scale=0.0)), Run("", DCA)]
    pictures = [np.asarray(isadca.decode(demo, z)[0], dtype=float) for z in isadca.sample(demo, ref, runs)]
    for i, picture in enumerate(pictures):
        assert all(np.abs(picture - other).max() > 10 for other in pictures[:i])


@pytest.mark.parametrize("steps, prompt", [(50, ""), (7, "a cat")])
def test_inversion_is_diffusers_inverse_scheduler(demo, cat, theirs, steps, prompt):
    """Every level of the chain, in float32: the schedule, RIVAL's label convention and the first level, ᾱ[0]."""
    assert_close(isadca.invert(demo, cat, steps, prompt).chain, theirs.invert(cat, steps, prompt), rtol=0,
                 atol=CHAIN[torch.float32])


@pytest.mark.parametrize("steps, size", [(30, (16, 16)), (8, (48, 32))])
def test_inversion_in_float64(demo64, cat, theirs64, steps, size):
    small = cat.resize(size)
    ours = isadca.invert(demo64, small, steps, size=size).chain
    assert_close(ours, theirs64.invert(small, steps), atol=CHAIN[torch.float64], rtol=0)


@pytest.mark.parametrize("prompt", ["", "a cat"])
def test_reconstruction_is_the_unguided_pipeline_from_the_last_level(demo, cat, plain_pipeline, prompt):
    ref = isadca.invert(demo, cat, 10, prompt)
    run = Run(prompt, Method(guidance=1.0))
    assert_same_picture(isadca.reconstruct(demo, ref), their_picture(plain_pipeline, ref, run))
