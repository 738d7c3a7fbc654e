"""The attention maps show something true, and come through the same seam as the picture."""

import importlib.util

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import isadca


@pytest.fixture(scope="module")
def maps():
    spec = importlib.util.spec_from_file_location("attention_maps", ROOT / "examples" / "attention_maps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded(maps, demo):
    ref = isadca.invert(demo, isadca.load_image(ROOT / "examples" / "pig.png"), steps=10)
    method = isadca.Method(lam=0.7, mix="attention")
    return ref, *maps.record(demo, ref, "a lemon", [(0.08, 0.08), (0.5, 0.5)], method)


def object_cells(picture: Image.Image, hw) -> torch.Tensor:
    """Which cells of the grid are mostly pig: red is above green there, and below it in the backdrop."""
    red, green = (np.asarray(picture).astype(int)[..., i] for i in (0, 1))
    mask = Image.fromarray((red > green).astype(np.uint8) * 255).resize(hw[::-1], Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(mask) > 128).flatten()


def test_backdrop_looks_at_backdrop_and_object_at_object(recorded):
    """Mean attention per cell of the reference, over the steps of the second half, at the 8 x 8 level."""
    ref, _, recorder = recorded
    layer = max(layer for layer, hw in recorder.hw.items() if hw == (8, 8))
    pig = object_cells(ref.image, (8, 8))
    assert 0.1 < pig.float().mean() < 0.5
    looks = torch.stack([look for (t, at), look in recorder.looks.items() if at == layer and t < 500]).mean(0)
    from_backdrop, from_object = looks
    assert from_backdrop[~pig].mean() > 2 * from_backdrop[pig].mean()
    assert from_object[pig].mean() > 2 * from_object[~pig].mean()


def test_maps_are_distributions_and_complete(recorded, demo):
    _, _, recorder = recorded
    layers = {site.layer for site in demo.unet.sites}
    times = {t for t, _ in demo.schedule.steps(10)}
    for kept in (recorder.looks, recorder.words, recorder.share):
        assert set(kept) == {(t, layer) for t in times for layer in layers}
    for look in recorder.looks.values():
        torch.testing.assert_close(look.sum(1), torch.ones(2))
    for words in recorder.words.values():
        torch.testing.assert_close(words.sum(1), torch.ones(len(words)))
    assert all(0 < share < 1 for share in recorder.share.values())


def test_recording_does_not_change_the_picture(recorded, demo):
    ref, picture, _ = recorded
    [plain] = isadca.vary(demo, ref, "a lemon", isadca.Method(lam=0.7, mix="attention"))
    assert abs(np.asarray(plain).astype(int) - np.asarray(picture)).max() <= 1


def test_the_example_writes_its_picture(maps, tmp_path, capsys):
    maps.main([str(ROOT / "examples" / "pig.png"), "a lemon", "-o", str(tmp_path / "maps.png"), "--steps", "3"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "maps.png")
    assert Image.open(tmp_path / "maps.png").width > 10 * 128
