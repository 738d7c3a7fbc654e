"""The same command gives the same bytes; `isadca check` tells whether another machine gives the same picture."""

import shutil

import numpy as np
import pytest
from conftest import DEMO, ROOT
from PIL import Image

from isadca.app import check
from isadca.app.cli import main
from isadca.app.recipe import read_recipe
from isadca.common.files import save_png
from isadca.common.images import load_image
from isadca.loading import load as loading
from isadca.networks.model import Model

CAT = str(ROOT / "examples" / "cat.png")


@pytest.mark.parametrize("flags", [[], ["--mix", "attention"], ["--init", "random", "--seed", "3"],
                                   ["--method", "rival"]], ids=" ".join)
def test_three_times_the_same_bytes(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        assert main(["vary", CAT, "a lemon", "-o", f"{name}.png", "-q", "--steps", "4", *flags]) == 0
    assert main(["vary", "--recipe", "a.png", "-o", "d.png", "-q"]) == 0
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abcd"}) == 1


def test_rows_at_once_changes_no_pixel_by_more_than_rounding(tmp_path, monkeypatch):
    """Other batch sizes add up in another order: 1 grey level, where a value lies between two. (Bytes differ: the
    recipe holds the flag.)"""
    monkeypatch.chdir(tmp_path)
    pixels = {}
    for rows in (1, 4, 8, 64):
        assert main(["vary", CAT, "a lemon", "-o", "m.png", "-q", "--steps", "4", "--n", "4", "--init", "shuffle",
                     "--rows-at-once", str(rows)]) == 0
        pixels[rows] = np.stack([load_image(f"m-{seed}.png") for seed in range(4)]).astype(int)
    assert max(abs(p - pixels[64]).max() for p in pixels.values()) <= 1


@pytest.fixture
def own_demo(tmp_path, monkeypatch, capsys):
    """The demo, made of links, in a folder where a picture may be stored."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for item in DEMO.iterdir():
        if item.name != "check.png":
            (folder / item.name).symlink_to(item)
    for module in (check, loading):
        monkeypatch.setattr(module, "default_weights", lambda: folder)
    assert main(["check", "--device", "cpu", "--renew"]) == 0
    assert capsys.readouterr().out == f"{folder / 'check.png'}\n"
    return folder


@pytest.mark.slow
def test_check(own_demo, capsys):
    for dtype, allowed in [("fp32", 1), ("fp16", 16)]:
        assert main(["check", "--device", "cpu", "--dtype", dtype]) == 0
        assert f"check.png at most, {allowed} allowed on cpu in float{dtype[2:]}; " in capsys.readouterr().out


def test_check_finds_another_picture(own_demo, capsys, monkeypatch):
    """Already a noise prediction that is 5 % too strong."""
    noise = Model.noise
    monkeypatch.setattr(Model, "noise", lambda *args: noise(*args) * 1.05)
    assert main(["check", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "another picture: " in err and "; try --device cpu --dtype fp32" in err and err.count("\n") == 1


def test_check_tells_other_weights_from_other_results(own_demo, capsys):
    recipe = read_recipe(own_demo / "check.png")
    recipe["weights_sha256"]["unet"] = "0" * 64
    save_png(Image.open(own_demo / "check.png"), own_demo / "check.png", recipe)
    assert main(["check", "--device", "cpu"]) == 2
    assert "was made with other demo weights; install isadca anew" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--mask", "--keep", "--also"])
def test_another_picture_beside_the_reference_is_noticed(folder, capsys, flag):
    beside = str(folder / "beside.png")
    shutil.copy(CAT, beside)
    assert main(["vary", str(CAT), "a lemon", "-o", "a.png", "-q", "--steps", "1", flag, beside]) == 0
    Image.new("RGB", (64, 64)).save(beside)
    capsys.readouterr()
    assert main(["vary", "--recipe", "a.png", "-o", "b.png", "-q"]) == 2
    assert f"a.png: was made with another {flag} (sha256 " in capsys.readouterr().err
