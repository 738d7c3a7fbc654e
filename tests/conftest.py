"""Shared by all tests: the demo model, loaded once, and small helpers. Everything is offline."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports diffusers or transformers

import pytest
import torch

import isadca

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
    """The demo checkpoint in float64, for identities."""
    return isadca.load(DEMO, device="cpu", dtype="fp64")


@pytest.fixture(scope="session")
def cat():
    return isadca.load_image(DEMO / "references" / "cat.png")


@pytest.fixture(scope="session")
def reference64(demo64, cat):
    """A 6-step inversion in float64: enough steps for every phase of a method."""
    return isadca.invert(demo64, cat, steps=6)
