"""isadca inspect knows every file that isadca or its evaluation reads; the page of layouts names them all."""

import json
from dataclasses import replace
import re

import pytest
import torch
from conftest import DEMO, ROOT
from keyfiles import listing, write_sparse

import isadca
from isadca.app.cli import main
from isadca.app.inspect import CHECKED, OTHERS
from isadca.evaluation.metrics import trunk_keys
from isadca.loading import checkpoints, diagnose
from isadca.loading.layouts import PLAIN, PREFIXES
from isadca.loading.original import ORIGINAL

PAGE = (ROOT / "isadca" / "loading" / "README.md").read_text(encoding="utf-8")


def described(capsys, *paths) -> list[dict]:
    assert main(["inspect", "--json", *map(str, paths)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- what it knows ------------------------------------------------------------------------------------------------

SINGLE = {
    "controlnet diffusers": (listing("controlnet_sd15_diffusers"), "ControlNet", "diffusers"),
    "controlnet LDM": (listing("controlnet_sd15_ldm"), "ControlNet", "LDM"),
    "prior": (listing("kandinsky22_prior"), "Kandinsky's prior", "diffusers"),
    **{kind: (dict.fromkeys(trunk_keys(kind), ("F32", (4, 3))), what, layout) for kind, what, layout in [
        ("alex", "AlexNet, for LPIPS", "torchvision"), ("vgg", "VGG16, for LPIPS", "torchvision"),
        ("inception", "Inception-v3, for SIFID", "torchvision"), ("alex heads", "the heads of LPIPS", "lpips"),
        ("vgg heads", "the heads of LPIPS", "lpips")]}}


@pytest.mark.parametrize("name", SINGLE)
def test_files_of_other_systems_and_metrics(tmp_path, capsys, name):
    """By the published key lists; LDM's ControlNet also as lllyasviel's file has it, without a prefix."""
    tensors, kind, layout = SINGLE[name]
    bare = {key.removeprefix("control_model."): about for key, about in tensors.items()}
    for file in (tensors, bare):
        [told] = described(capsys, write_sparse(tmp_path / "x.safetensors", file))
        [part] = told["parts"]
        assert (part["kind"], part["layout"], part["tensors"], part["loads"]) == (kind, layout, len(file), None)
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert f"x.safetensors: {kind}, layout {layout}, " in capsys.readouterr().out


@pytest.mark.parametrize("folder, kinds", [
    ("", ["unet", "vae", "text", "ip_adapter", "vision"]), ("image-variations", ["unet", "vae", "vision"]),
    ("prior", ["text", "prior"]), ("controlnet-shuffle", ["ControlNet"]), ("metrics/clip", ["text", "vision"])])
def test_folders_of_other_systems(capsys, folder, kinds):
    [told] = described(capsys, DEMO / folder)
    assert [part["kind"] for part in told["parts"]] == kinds


def test_a_model_with_a_controlnet_in_it_is_a_model(tmp_path, capsys):
    merged = listing("sd15_single_file_ldm_emaonly") | listing("controlnet_sd15_ldm")
    [told] = described(capsys, write_sparse(tmp_path / "x.safetensors", merged))
    assert [part["kind"] for part in told["parts"]] == ["unet", "vae", "text"]


def test_a_vit_l_without_config_is_said_to_be_openais(tmp_path, capsys):
    path = write_sparse(tmp_path / "x.safetensors", listing("image_encoder_vit_l14_lambda"))
    assert main(["inspect", str(path)]) == 0
    assert f"{path}: taken for OpenAI's ViT-L/14; LAION's needs its config.json" in capsys.readouterr().err


def test_json_of_every_kind(tmp_path, capsys, demo):
    """A picture, a saved reference, a results folder: one object each, with the path."""
    picture = isadca.load_image(DEMO / "references" / "cat.png")
    isadca.save_png(picture, tmp_path / "a.png", {"command": "sweep", "args": {}, "device": "cpu"})
    isadca.save_reference(isadca.invert(demo, picture, 1), tmp_path / "a.safetensors", "weights")
    (tmp_path / "settings.json").write_text('{"steps": 50}')
    told = described(capsys, tmp_path / "a.png", tmp_path / "a.safetensors", tmp_path)
    assert [(each["what"], each["path"]) for each in told] == [
        ("a picture", f"{tmp_path}/a.png"), ("a saved reference", f"{tmp_path}/a.safetensors"),
        ("results", str(tmp_path))]
    assert told[0]["device"] == "cpu" and told[1]["steps"] == 1 and told[2]["settings"] == {"steps": 50}


def test_what_vary_returns_is_saved_with_its_run(tmp_path, capsys, tiny, tiny_ref):
    """The run as Python would make it again, one seed a picture; a picture read from a file carries nothing over."""
    for n, picture in enumerate(isadca.vary(tiny, tiny_ref, ["a lemon", "a pig"], "rival", (3, 4), lam=0.5)):
        isadca.save_png(picture, tmp_path / f"{n}.png")
    told = described(capsys, *(tmp_path / f"{n}.png" for n in range(4)))
    runs = [eval(each["command"], vars(isadca.methods)) for each in told]
    assert [(run.prompt, run.seeds) for run in runs] == [
        ("a lemon", (3,)), ("a lemon", (4,)), ("a pig", (3,)), ("a pig", (4,))]
    assert runs[0].method == replace(isadca.PRESETS["rival"], lam=0.5, steps=6)
    isadca.save_png(isadca.load_image(tmp_path / "0.png"), tmp_path / "again.png")
    assert main(["inspect", str(tmp_path / "again.png")]) == 2


# --- headers ------------------------------------------------------------------------------------------------------

def test_a_single_files_header_is_read_once(tmp_path, monkeypatch):
    from isadca.loading import load as loading
    path, read = write_sparse(tmp_path / "x.safetensors", listing("sd15_single_file_ldm_emaonly")), []
    monkeypatch.setattr(checkpoints, "read_header", lambda path, ours=checkpoints.read_header: (
        read.append(path), ours(path))[1])
    assert loading.read_parts(loading.locate(path), torch.float32).keys() == {"unet", "vae", "text"}
    assert read == [path]


def test_what_is_checked_is_what_can_be_built():
    from isadca.loading.load import NETWORKS
    assert set(CHECKED) == {*NETWORKS, "ip_adapter"}


def test_prefixes_are_those_of_the_layouts():
    assert set(PREFIXES) == {layout.prefix for layout in ORIGINAL if layout.prefix}


# --- the page -----------------------------------------------------------------------------------------------------

def test_the_page_names_tests_that_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    for file, test in named:
        path = ROOT / "tests" / (file if "/" in file else f"loading/{file}")
        assert re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{test}"
    assert len(named) > 25


def test_the_page_has_every_layout():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:2] == "| "]
    listed = {(kind, row[1]) for row in rows if len(row) > 2 for kind in (*row[0].split(", "), row[0])}
    wanted = {(layout.kind, layout.name) for layout in PLAIN + ORIGINAL} | {other[:2] for other in OTHERS}
    assert wanted - listed == set()
    refused = [what for _, what, _ in diagnose.STRANGERS + diagnose.UNKNOWN]
    assert [what for what in refused if what not in PAGE] == []
