"""examples/in_diffusers.py: isadca's attend functions inside diffusers give isadca's pictures."""

from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import theirs as diffusers_side
import torch
from conftest import ROOT
from PIL import Image

import isadca
from isadca import Method, Run, attend, dca
from steps import condition
from isadca.reference import initial_latents


@pytest.fixture(scope="module")
def example():
    spec = spec_from_file_location("in_diffusers", ROOT / "examples" / "in_diffusers.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe():
    return diffusers_side.pipeline(diffusers_side.load(), adapter=False)


def test_the_example_agrees_with_isadca(example, demo, tmp_path, monkeypatch, capsys):
    """Both branches, λ and guidance, run from elsewhere; the picture it writes is isadca's."""
    monkeypatch.chdir(tmp_path)
    example.main([str(ROOT / "examples" / "pig.png"), "a house", "--steps", "5", "-o", "out.png"])
    assert capsys.readouterr().out.startswith("out.png: differs from isadca's own picture by at most ")
    ref = isadca.invert(demo, isadca.load_image(ROOT / "examples" / "pig.png"), steps=5)
    [expected] = isadca.vary(demo, ref, "a house")
    difference = np.abs(np.asarray(Image.open("out.png"), int) - np.asarray(expected, int)).max()
    assert difference <= 1


def test_an_attend_function_serves_a_whole_pipeline(example, demo, cat, pipe):
    """DCA installed once: a diffusers pipeline with isadca's image branch is our λ = 0."""
    ref = isadca.Reference(cat, torch.full((6, 4, 16, 16), float("nan")))
    run = Run("a lemon", Method(lam=0.0, init="random"))
    example.install(pipe.unet, dca(condition(demo, ref, run).ip_kv))
    latents = initial_latents(ref, run.method, run.seeds)
    theirs = pipe("a lemon", num_inference_steps=5, guidance_scale=7.0, latents=latents).images[0]
    example.install(pipe.unet, attend)
    [ours] = isadca.vary(demo, ref, run.prompt, run.method)
    assert np.abs(np.asarray(theirs, int) - np.asarray(ours, int)).max() <= 1


def test_sites_are_isadcas(example, demo, pipe):
    """What the adapter tells an attend function about its layer is what isadca's own UNet tells it, in that order."""
    def calls(run):
        seen = []
        run(lambda q, k, v, site: (seen.append((site, q.shape, k.shape)), attend(q, k, v, site))[1])
        return seen
    z, context = torch.randn(1, 4, 16, 16), demo.context(["a cat"])

    def in_diffusers(probe):
        example.install(pipe.unet, probe)
        pipe.unet(z, 500, context)
    assert calls(in_diffusers) == calls(lambda probe: demo.noise(z, 500, context, probe))
