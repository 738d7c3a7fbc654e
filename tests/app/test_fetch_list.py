"""The published files that isadca fetch knows: their list, their sizes, and that vary finds them."""

import hashlib
import re

import pytest
from conftest import DEMO, ROOT
from keyfiles import cast, listing, write_sparse

from isadca.app import fetch
from isadca.app.fetch import PINNED
from isadca.loading.load import FOLDERS, locate


def test_the_list_is_well_formed():
    """Full commits and checksums, no file at two places, no place for two files."""
    assert len({item.target(ROOT) for item in PINNED}) == len(PINNED) == 24
    for item in PINNED:
        assert re.fullmatch("[0-9a-f]{64}|-", item.sha256) and re.fullmatch("[0-9a-f]{40}|main", item.revision)
        assert item.size > 0 and (item.sha256 != "-" or item.size < 1000)  # all that is large has a checksum
    vocabulary = {item.file: item.sha256 for item in PINNED if item.file.startswith("tokenizer/")}
    for name, digest in vocabulary.items():  # the same as in the repository
        assert hashlib.sha256((DEMO.parent / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("file, keys, dtype", [
    ("unet/diffusion_pytorch_model.fp16.safetensors", "sd15_diffusers_unet", "F16"),
    ("vae/diffusion_pytorch_model.fp16.safetensors", "sd15_diffusers_vae_new_names", "F16"),
    ("text_encoder/model.fp16.safetensors", "sd15_diffusers_text_encoder", "F16"),
    ("v1-5-pruned-emaonly.safetensors", "sd15_single_file_ldm_emaonly", "F32"),
    ("models/ip-adapter_sd15.safetensors", "ip-adapter_sd15", "F16"),
    ("models/ip-adapter_sd15_light.safetensors", "ip-adapter_sd15", "F16"),
    ("models/ip-adapter_sd15_vit-G.safetensors", "ip-adapter_sd15_vit-G", "F16"),
    ("models/ip-adapter-plus_sd15.safetensors", "ip-adapter-plus_sd15", "F16"),
    ("models/ip-adapter-plus-face_sd15.safetensors", "ip-adapter-plus_sd15", "F16"),
    ("models/ip-adapter-full-face_sd15.safetensors", "ip-adapter-full-face_sd15", "F16"),
    ("models/image_encoder/model.safetensors", "image_encoder_vit_h", "F32"),
    ("sdxl_models/image_encoder/model.safetensors", "image_encoder_vit_bigG", "F16")])
def test_a_size_is_that_of_the_published_keys(tmp_path, file, keys, dtype):
    """To the few bytes by which headers differ: "format", padding, the order of the tensors."""
    size = {item.size for item in PINNED if item.file == file}
    path = write_sparse(tmp_path / "file.safetensors", cast(listing(keys), dtype))
    assert len(size) == 1 and abs(size.pop() - path.stat().st_size) < 64


def test_every_adapter_comes_with_its_encoder():
    for name in fetch.names():
        if name.startswith("ip-adapter"):
            adapter, *_, encoder = [item.file for item in fetch.wanted([name])]
            folder = "sdxl_models" if "vit-G" in adapter else "models"
            assert encoder == f"{folder}/image_encoder/model.safetensors" and adapter.startswith("models/ip-adapter")


def test_what_is_fetched_is_found_by_vary(tmp_path):
    """The layout: a folder per network, the base adapter among all of them, the flags for the others."""
    for item in PINNED:
        item.target(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        item.target(tmp_path).touch()
    sd15 = tmp_path / "sd15"
    assert all((sd15 / FOLDERS[kind]).is_dir() for kind in ("unet", "vae", "text"))
    assert locate(sd15)["ip_adapter"] == sd15 / "models/ip-adapter_sd15.safetensors"
    step = lambda *names: fetch.next_steps(fetch.wanted(names), tmp_path)[-1]
    weights = f"isadca vary PICTURE PROMPT -o out.png --weights {sd15}"
    assert step("sd15", "ip-adapter") == step("all").partition(" --vae")[0] == weights
    assert step("ip-adapter-plus") == f"{weights} --ip-adapter {sd15}/models/ip-adapter-plus_sd15.safetensors"
    assert step("image-variations").startswith(f"isadca convert {tmp_path}/image-variations/image_encoder/pytorch")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (sd15 / part).rename(tmp_path / part)
    assert step("sd15-single") == f"{weights}/v1-5-pruned-emaonly.safetensors"
    (sd15 / "v1-5-pruned-emaonly.safetensors").unlink()
    assert step("ip-adapter") == f"isadca fetch sd15 --to {tmp_path}"
