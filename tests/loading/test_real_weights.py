"""The real weights, where they are: the published files, and the pictures that diffusers' own tests expect of them.

    isadca fetch all --to FOLDER
    ISADCA_WEIGHTS=FOLDER pytest -m weights

A test whose files are not there is skipped and says which. Without a GPU a picture takes minutes.

The figures are the ones in diffusers' tests that Stable Diffusion 1.5, IP-Adapter and text alone lead to: nine values
of one channel in a corner of the picture. Left out: those that need image-to-image, inpainting, ControlNet, LMS, two
adapters at once or FaceID, those of Stable Diffusion 1.1 and 1.4, and whole pictures that lie on other servers.
The two tests without a mark hold the same recipes against diffusers' pipeline with the demo checkpoint.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import theirs
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image

import isadca
from isadca import Method, Reference, Run
from isadca.app import fetch
from isadca.app.cli import main
from isadca.app.inspect import parts_of
from steps import condition, predict_at

weights = pytest.mark.weights

# fp16 weights, other kernels and other devices than theirs; a wrong layer or prompt is off by 0.1 and more
TOLERANCE = 0.03

STATUE = "https://user-images.githubusercontent.com/24734142/266492875-2d50d223-8475-44f0-a7c6-08b51cb53572.png"
PROMPTS = dict(prompt="best quality, high quality",
               negative="monochrome, lowres, bad anatomy, worst quality, low quality")


def ddim_picture(model: isadca.Model, prompt: str, z: torch.Tensor, steps: int) -> np.ndarray:
    """Stable Diffusion alone, through `sample`, from a given z_T. (H,W,3) in [0,1]."""
    chain = torch.cat([torch.full_like(z, float("nan"))] * steps + [z])  # of which only z_T may be looked at
    method = Method(lam=0.0, guidance=7.5, ip_scale=0.0)
    [z] = isadca.sample(model, Reference(Image.new("RGB", (8, 8)), chain), [Run(prompt, method)])
    return values(model.decode(z))


def pndm_picture(model: isadca.Model, scheduler: PNDMScheduler, image: Image.Image, z: torch.Tensor, steps: int,
                 ip_scale: float) -> np.ndarray:
    """IP-Adapter under diffusers' default scheduler: `predict` for the noise, their update. (H,W,3) in [0,1]."""
    run = Run(method=Method(lam=0.0, guidance=7.5, ip_scale=ip_scale), **PROMPTS)
    told = condition(model, Reference(image, z), run)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps.tolist():
        z = scheduler.step(predict_at(model, z, t, told, None, run.method).mixed, t, z).prev_sample
    return values(model.decode(z))


def values(x: torch.Tensor) -> np.ndarray:
    return (x[0].float().cpu().permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()


def noise(model: isadca.Model, seed: int) -> torch.Tensor:
    side = model.unet.config.sample_size
    z = np.random.RandomState(seed).standard_normal((1, 4, side, side))
    return torch.from_numpy(z).to(model.device, torch.float32)


def assert_published(corner: np.ndarray, expected: list[float]) -> None:
    ours = [round(float(value), 4) for value in corner.flatten()]
    assert np.abs(np.subtract(ours, expected)).max() < TOLERANCE, f"{ours}, published {expected}"


# --- with the demo checkpoint -------------------------------------------------------------------------------------

def test_our_ddim_recipe_is_diffusers(demo):
    pipe = theirs.pipeline(theirs.load(), adapter=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    z = noise(demo, 0)
    expected = pipe("a cat", num_inference_steps=10, guidance_scale=7.5, latents=z, output_type="np").images[0]
    assert expected.std() > 0.05 and np.abs(ddim_picture(demo, "a cat", z, 10) - expected).max() < 1e-3


@pytest.mark.parametrize("ip_scale", [1.0, 0.7])
def test_our_pndm_recipe_is_diffusers(demo, cat, ip_scale):
    their = theirs.load()
    embeds = their.embed(cat)[None]
    pipe = theirs.pipeline(their, adapter=True)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.set_ip_adapter_scale(ip_scale)
    z = noise(demo, 33)
    expected = pipe(PROMPTS["prompt"], negative_prompt=PROMPTS["negative"], num_inference_steps=5, guidance_scale=7.5,
                    latents=z, output_type="np",
                    ip_adapter_image_embeds=[torch.cat([torch.zeros_like(embeds), embeds])]).images[0]
    ours = pndm_picture(demo, PNDMScheduler.from_config(pipe.scheduler.config), cat, z, 5, ip_scale)
    assert expected.std() > 0.05 and np.abs(ours - expected).max() < 1e-3


# --- with the real ones -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder() -> Path:
    if "ISADCA_WEIGHTS" not in os.environ:
        pytest.skip("ISADCA_WEIGHTS is not set; isadca fetch all --to FOLDER, then ISADCA_WEIGHTS=FOLDER")
    return Path(os.environ["ISADCA_WEIGHTS"])


def needed(folder: Path, *names: str) -> list[Path]:
    """The files of the named sets; skips where one is missing."""
    paths = [item.target(folder) for item in fetch.wanted(list(names))]
    for path in paths:
        if not path.exists():
            pytest.skip(f"{path} is not there; isadca fetch {' '.join(names)} --to {folder}")
    return paths


@weights
@pytest.mark.parametrize("name", fetch.names())
def test_the_files_are_the_published_ones(folder, name):
    """Size and sha256 of each."""
    needed(folder, name)
    assert fetch.missing(fetch.wanted([name]), folder) == []


@weights
@pytest.mark.parametrize("name", [n for n in fetch.names() if n not in ("clip-vit-l", "image-variations")])
def test_the_files_fit_our_networks(folder, name):
    """Every tensor has its place, none is left over."""
    for path in needed(folder, name):
        if path.suffix == ".safetensors":
            parts_of(path)


@weights
def test_sd15_makes_the_published_picture(folder):
    """Text, UNet, DDIM and VAE. diffusers tests/pipelines/stable_diffusion/test_onnx_stable_diffusion.py,
    test_inference_ddim: float32 (the single file, if it is there)."""
    single = folder / "sd15" / "v1-5-pruned-emaonly.safetensors"
    if not single.exists():
        needed(folder, "sd15")
    model = isadca.load(single if single.exists() else folder / "sd15", ip_adapter="none", dtype="fp32")
    picture = ddim_picture(model, "open neural network exchange", noise(model, 0), 10)
    assert_published(picture[-3:, -3:, -1],
                     [0.2867, 0.1974, 0.1481, 0.7294, 0.7251, 0.6667, 0.4194, 0.5642, 0.6486])


@weights
@pytest.mark.parametrize("name, file, ip_scale, expected", [
    ("ip-adapter", "ip-adapter_sd15", 1.0, [0.3291, 0.2964, 0.2742, 0.3010, 0.2698, 0.2507, 0.2917, 0.2671, 0.2478]),
    ("ip-adapter-plus", "ip-adapter-plus_sd15", 1.0, [0.1238, 0.0579, 0.0312, 0.0493, 0.0010, 0, 0.0188, 0, 0]),
    ("ip-adapter-full-face", "ip-adapter-full-face_sd15", 0.7,
     [0.4033, 0.3989, 0.3992, 0.4006, 0.3879, 0.4355, 0.4192, 0.4333, 0.4753])])
def test_ip_adapter_makes_the_published_picture(folder, name, file, ip_scale, expected):
    """Image encoder, adapter and everything above. diffusers tests/pipelines/ip_adapters/
    test_ip_adapter_stable_diffusion.py, test_text_to_image and test_text_to_image_full_face: fp16 on a GPU."""
    needed(folder, "sd15", name)
    picture = folder / STATUE.rpartition("/")[2]
    if not picture.exists():
        pytest.skip(f"{picture} is not there; get it from {STATUE}")
    model = isadca.load(folder / "sd15", ip_adapter=folder / "sd15" / "models" / f"{file}.safetensors")
    scheduler = PNDMScheduler.from_pretrained(folder / "sd15" / "scheduler")
    image = Image.open(picture).convert("RGB")  # as theirs is read
    assert_published(pndm_picture(model, scheduler, image, noise(model, 33), 5, ip_scale)[:3, :3, -1], expected)


@weights
def test_a_variation_with_everything(folder, tmp_path):
    """Both branches, from the command line: what was fetched is found, and a picture comes out."""
    needed(folder, "sd15", "ip-adapter")
    out = tmp_path / "out.png"
    argv = ["vary", ROOT / "examples" / "cat.png", "a lemon", "-o", out, "--weights", folder / "sd15", "--steps", 2]
    assert main([*map(str, argv)]) == 0
    assert np.asarray(Image.open(out)).std() > 20
