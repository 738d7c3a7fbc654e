"""Shared by all tests: the demo model, loaded once, and small helpers. Everything is offline."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports diffusers or transformers

import pytest
import torch
from PIL import Image

import isadca
from isadca.ddim import Schedule
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.networks.ip_adapter import IPAdapter
from isadca.networks.model import Model
from isadca.networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from isadca.networks.tokenizer import Tokenizer
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

torch.set_num_threads(1)  # the tensors are small, and tests often share the machine

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "weights" / "demo"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo():
    """The demo checkpoint in float32."""
    return isadca.load(DEMO, device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def demo64():
    """The demo checkpoint in float64."""
    return isadca.load(DEMO, device="cpu", dtype="fp64")


@pytest.fixture
def isadca_cli(tmp_path, monkeypatch, capsys, demo):
    """Run a command in an empty folder with the demo model; returns (exit code, stdout lines, stderr)."""
    from isadca.app.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*argv, steps=3):
        argv = [*map(str, argv)] + (["--steps", str(steps)] if steps and argv[0] in ("vary", "sweep", "invert") else [])
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err
    return run


def tiny_model(dtype: torch.dtype = torch.float64) -> Model:
    """A whole model with random weights, two levels and five attending blocks: identities need no training."""
    torch.manual_seed(1)
    unet = UNet(UNetConfig(channels=(16, 32), attention=(True, False), layers_per_block=2, n_heads=2,
                           context_dim=24, norm_groups=8, sample_size=8))
    vae = VAE(VAEConfig(channels=(8, 16), layers_per_block=1, norm_groups=4, scaling_factor=1.0))
    text = CLIPText(CLIPTextConfig(vocab_size=772, width=24, layers=2, n_heads=2, mlp_width=48, max_tokens=12))
    vision = CLIPVision(CLIPVisionConfig(width=24, layers=2, n_heads=2, mlp_width=48, image_size=16, patch_size=8,
                                         projection_dim=20))
    shapes = {"image_proj.norm.weight": (24,), "image_proj.proj.weight": (4 * 24, 20)}
    order = {"down": 0, "up": 1, "mid": 2}
    cross = sorted((s for s in unet.sites if s.kind == "cross"), key=lambda s: order[s.place])
    for i, site in enumerate(cross):
        shapes[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = (unet.get_submodule(site.name).to_q.out_features, 24)
    networks = [unet, vae, text, vision, IPAdapter(shapes)]
    for network in networks:
        for parameter in network.parameters():  # strong weights, so that every input matters
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=1.5 * fan_in**-0.5 if parameter.ndim > 1 else 1)
        network.to(dtype).eval().requires_grad_(False)
    tokenizer = Tokenizer.from_folder(DEMO / "tokenizer", 12)
    unet, vae, text, vision, adapter = networks
    return Model(unet=unet, vae=vae, text=text, tokenizer=tokenizer, schedule=Schedule(), vision=vision,
                 ip_adapter=adapter, device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(scope="session")
def tiny():
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_ref(tiny):
    """A 6-step inversion in float64: enough steps for every phase of a method."""
    picture = Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy())
    return isadca.invert(tiny, picture, steps=6)


@pytest.fixture(scope="session")
def cat():
    return isadca.load_image(DEMO / "references" / "cat.png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`in` for what the user has; the current folder, empty, is where output would go."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    return tmp_path / "in"
