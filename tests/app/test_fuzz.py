"""Readers of files from elsewhere, under random damage: a result or a Problem of one line, never anything else.

Longer: HYPOTHESIS_EXAMPLES=20000 pytest tests/app/test_fuzz.py
"""

import io
import json
import os
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from keyfiles import listing, write_sparse
from PIL import Image
from safetensors.torch import save

from isadca.app import commands, inspect
from isadca.app.cli import main
from isadca.app.recipe import read_recipe
from isadca.app.saved_reference import load_reference
from isadca.common.files import save_png
from isadca.common.images import RECIPE_KEY, load_image
from isadca.common.problem import Problem
from isadca.loading.layouts import PLAIN
from isadca.loading.original import ORIGINAL
from isadca.methods import PRESETS

LONG = os.environ.get("HYPOTHESIS_EXAMPLES")
FUZZ = settings(max_examples=int(LONG or 50), derandomize=not LONG, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def read(call, *args):
    """The result, or None for a Problem of one line."""
    try:
        return call(*args)
    except Problem as problem:
        assert "\n" not in str(problem)


def damaged(draw, data: bytes) -> bytes:
    """Some bytes replaced, removed or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=6)) + data[at + draw(st.integers(0, 6)):]
    return data[:draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


# --- checkpoints

PUBLISHED = {key: about for name in ("sd15_diffusers_vae_new_names", "ip-adapter_sd15", "ip-adapter-plus_sd15",
                                     "ip-adapter-full-face_sd15", "image_encoder_vit_h")
             for key, about in list(listing(name).items())[:40]}
MARKS = [layout.mark for layout in ORIGINAL + PLAIN] + ["vision_model.pre_layrnorm.weight", "conv_in.weight"]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 9, 20, 257, 320, 768, 1024, 1280, 2**31, 2**62])
SHAPES = st.lists(SIZES, max_size=5).map(tuple).filter(lambda s: 0 in s or prod(s) < 2**24)
TENSORS = st.dictionaries(st.sampled_from(MARKS) | st.sampled_from(sorted(PUBLISHED)) | st.text(max_size=12),
                          st.tuples(st.sampled_from(["F32", "F16", "BF16", "I64"]), SHAPES), max_size=8)


@FUZZ
@given(st.data())
def test_headers(folder, data):
    """Published names with the wrong shapes, and the other way round."""
    kept = data.draw(st.sets(st.sampled_from(sorted(PUBLISHED)), max_size=30))
    tensors = {key: PUBLISHED[key] for key in kept} | data.draw(TENSORS)
    read(inspect.parts_of, write_sparse(folder / "header.safetensors", tensors))


@FUZZ
@given(st.data())
def test_checkpoint_bytes(folder, data):
    (folder / "x.safetensors").write_bytes(damaged(data.draw, ADAPTER))
    read(inspect.parts_of, folder / "x.safetensors")


ADAPTER = save({"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2), "image_proj.norm.weight": torch.zeros(3),
                "image_proj.proj.weight": torch.zeros(4, 2)})


# --- references

@FUZZ
@given(st.data())
def test_references(folder, data):
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64])
    small = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5)
    tensors = {name: torch.zeros(data.draw(small | st.just(shape)), dtype=data.draw(dtypes | st.just(dtype)))
               for name, shape, dtype in [("chain", [3, 4, 2, 2], torch.float32), ("image", [8, 8, 3], torch.uint8)]
               if data.draw(st.integers(0, 9))}
    content = save(tensors, {"format": "isadca reference 1", "weights": "w", "prompt": data.draw(st.text(max_size=5))})
    (folder / "x.safetensors").write_bytes(content if data.draw(st.booleans()) else damaged(data.draw, content))
    ref = read(load_reference, folder / "x.safetensors", "w")
    assert ref is None or ref.steps > 0 and ref.image.width % ref.chain.shape[3] == 0


# --- pictures and recipes

def encoded(format: str, **options) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(file, format, **options)
    return file.getvalue()


@FUZZ
@given(st.data())
def test_pictures(folder, data):
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]))
    (folder / "x").write_bytes(damaged(data.draw, encoded(format)))
    image = read(load_image, folder / "x", str)
    assert image is None or image.mode == "RGB"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))
SAID = {"ref": "cat.png", "prompt": "a lemon", "steps": 2, "lam": "0.7", "layers": [1, 2], "seed": 0, "fit": "pad",
        "size": None, "weights": None, "method": None}
NAMES = st.sampled_from([*SAID, "n", "guidance", "dtype", "command", "out", "grid", "help", "recipe", "func"])


@FUZZ
@given(st.data())
def test_recipes(folder, data):
    """Up to the command, which is given what a typed line could have given it."""
    args = SAID | data.draw(st.dictionaries(NAMES | st.text(max_size=8), JSON, max_size=3))
    recipe = {"command": "vary", "args": args, "weights_sha256": {}} | data.draw(
        st.dictionaries(st.sampled_from(["command", "args", "weights_sha256", "reference_sha256"]), JSON, max_size=1))
    save_png(Image.new("RGB", (1, 1)), folder / "x.png", recipe)
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "vary", called.append)
        code = main(["vary", "--recipe", str(folder / "x.png"), "-o", "mine.png"])
    assert code == 2 - 2 * len(called)
    for made in called:
        assert made.command == "vary" and made.out == Path("mine.png") and made.grid is None
        assert isinstance(made.n, int) and isinstance(made.prompt, str) and made.method in (None, *PRESETS)
        assert isinstance(made.recipe_source["weights_sha256"], dict)


@FUZZ
@given(st.data())
def test_recipe_bytes(folder, data):
    (folder / "x.png").write_bytes(damaged(data.draw, PICTURE))
    recipe = read(read_recipe, folder / "x.png")
    assert recipe is None or isinstance(recipe, dict)


def _picture() -> bytes:
    from PIL import PngImagePlugin
    info = PngImagePlugin.PngInfo()
    info.add_itxt(RECIPE_KEY, json.dumps({"command": "vary", "args": SAID}))
    return encoded("PNG", pnginfo=info)


PICTURE = _picture()
