"""The demo checkpoint's recipe, examples/train_demo, without its art and its hours: the world, the tokenizer that it
learns, the files that it writes, a training that is stopped and resumed. And what is shipped: sizes, and a judge that
knows the shipped scenes."""

import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

import isadca
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.common.images import to_tensor
from isadca.networks.tokenizer import Tokenizer
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

sys.path.insert(0, str(ROOT / "examples" / "train_demo"))
world, files, fit, judge = (importlib.import_module(f"demo_{name}") for name in ("world", "files", "fit", "judge"))
groups = importlib.import_module("demo_groups")
sys.path.pop(0)

ART = {(noun, style): Image.new("RGBA", (128, 128), (10, 20, 30, 255)) for noun in world.NOUNS
       for style in world.STYLES}


def scenes(n: int, **options) -> list:
    rng = np.random.default_rng(0)
    return [world.random_scene(rng, **options) for _ in range(n)]


# ---- the world ---------------------------------------------------------------------------------------------------

def test_no_training_scene_is_held_out():
    assert not any(world.held_out(*scene[:4]) for scene in scenes(2000))
    assert all(world.held_out(*scene[:4]) for scene in scenes(200, unseen=True))


@pytest.mark.parametrize("attribute", sorted(set(groups.GROUPS)))
def test_a_hard_group_differs_in_one_attribute_and_says_so(attribute):
    """Its scenes are training scenes that differ in it and in what no caption says; its captions, in one word."""
    table, rng = groups.Groups(scenes(20000)), np.random.default_rng(0)
    for _ in range(20):
        found, texts = table.group(attribute, rng)
        members = [table.scenes[i] for i in found]
        words = {getattr(scene, attribute) for scene in members}
        assert len(words) == len(members) == len(texts) == (2 if attribute == "style" else 4)
        assert not any(world.held_out(*scene[:4]) for scene in members)
        for key in set(groups.KEYS) - {attribute}:
            assert len({getattr(scene, key) for scene in members}) == 1
        assert all(getattr(scene, attribute) in text for scene, text in zip(members, texts))
        bare = {re.sub(rf"\b{getattr(scene, attribute)}\b", "", text).replace("an ", "a ")
                for scene, text in zip(members, texts)}
        assert len(bare) == 1


def test_half_of_a_hard_batch_is_groups():
    table = groups.Groups(scenes(20000))
    index, texts = table.batch(64, np.random.default_rng(0))
    assert len(index) == len(texts) == 64


@pytest.mark.parametrize("field, values", [("noun", world.NOUNS), ("style", world.STYLES),
                                           ("colour", world.COLOURS), ("pattern", world.PATTERNS)])
def test_holding_out_leaves_every_attribute_in_both_halves(field, values):
    """A noun, colour or pattern that is missing from one half would make its figure meaningless."""
    for unseen in (False, True):
        assert {getattr(scene, field) for scene in scenes(1500, unseen=unseen)} == set(values)


def test_a_scene_that_cannot_be_is_an_error_not_a_wait():
    with pytest.raises(ValueError, match="no held-out scene has .*apple"):
        scenes(1, unseen=True, noun="apple", pattern="plain")


def test_captions_say_what_is_there_and_no_more():
    rng = np.random.default_rng(1)
    for scene in scenes(500):
        words = set(world.caption(scene, rng).replace(",", " ,").split())
        assert scene.noun in words <= set(world.vocabulary())
        assert words & set(world.COLOURS) <= {scene.colour} and words & set(world.PATTERNS) <= {scene.pattern}
        assert words & set(world.STYLES) <= {scene.style} and words & set(world.PLACES) <= {scene.place}


def test_what_captions_leave_out_shows_in_the_picture():
    """Phase, exact place, shade and size differ between scenes of one caption: this is what only ISA can carry."""
    [scene] = scenes(1, pattern="striped")
    for change in (dict(phase=(scene.phase[0] + 4, scene.phase[1])), dict(shade=scene.shade * 0.95),
                   dict(big=not scene.big), dict(offset=(scene.offset[0] + 1, scene.offset[1] + 1))):
        other = scene._replace(**change)
        assert world.caption(other, np.random.default_rng(2)) == world.caption(scene, np.random.default_rng(2))
        assert not np.array_equal(world.draw(other, ART), world.draw(scene, ART)), change


@pytest.mark.parametrize("pattern", world.PATTERNS)
def test_outside_is_the_backdrop_alone(pattern):
    """Where the mask is set, the picture is the background, pixel by pixel; and the mask is not empty."""
    for scene in scenes(30, pattern=pattern):
        clear = world.background(scene).clip(0, 255).round().astype(np.uint8)
        outside = world.outside(scene)
        assert 0.25 < outside.mean() < 0.9
        np.testing.assert_array_equal(world.draw(scene, ART)[outside], clear[outside])


def test_patterns_repeat_after_sixteen_pixels():
    for scene in scenes(20):
        picture = world.background(scene)
        np.testing.assert_allclose(picture[16:], picture[:-16], atol=1e-4)
        np.testing.assert_allclose(picture[:, 16:], picture[:, :-16], atol=1e-4)


# ---- files -------------------------------------------------------------------------------------------------------

def test_every_word_of_the_world_is_one_token(tmp_path):
    world.save_tokenizer(tmp_path, 32)
    tokenizer = Tokenizer.from_folder(tmp_path, 32)
    for word in world.vocabulary():
        rows = [rows for _, rows in tokenizer.words(word)]
        assert rows == ([[1], [2]] if word == "3d" else [[1]]), word
    assert tokenizer("a").max() == files.CLIP_TEXT.vocab_size - 1, "the end of text must be the last id"


def test_the_longest_caption_fits():
    [scene] = scenes(1, style="3d", pattern="checkered", place="middle")
    tokenizer = Tokenizer.from_folder(DEMO / "tokenizer", 1000)
    rng = np.random.default_rng(0)
    longest = max((world.caption(scene, rng) for _ in range(100)), key=len)
    tokens = (tokenizer([longest]) != tokenizer.end_id).sum() - 1  # without the start
    assert 12 < tokens <= files.MAX_TOKENS - 2


@pytest.mark.parametrize("net, config, theirs", [
    (UNet, files.UNET, UNet2DConditionModel), (VAE, files.VAE_SIZES, AutoencoderKL),
    (CLIPText, files.CLIP_TEXT, CLIPTextModelWithProjection),
    (CLIPVision, files.CLIP_VISION, CLIPVisionModelWithProjection)])
def test_what_is_written_is_what_we_and_the_others_read(tmp_path, net, config, theirs):
    """Our config.json gives back our sizes, and builds the same tensors in diffusers and transformers."""
    ours = net(config)
    files.save_network(tmp_path, ours, config)
    again = files.load_network(tmp_path, net)
    assert again.config == config
    loaded, info = theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info.get("mismatched_keys")
    parameters = sum(p.numel() for p in ours.parameters())
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in loaded.parameters()) == parameters


def test_the_shipped_folder_is_small():
    """Goals of the demo: 30 MB for the model, 40 MB for what it is compared with and measured by, 16 MB a file, so
    that it can live in the repository."""
    others = ("image-variations", "controlnet-shuffle", "prior", "metrics", "pairs")
    sizes = {path.relative_to(DEMO): path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    assert {path: size for path, size in sizes.items() if size > 16e6} == {}
    assert sum(size for path, size in sizes.items() if path.parts[0] not in others) < 30e6
    assert sum(size for path, size in sizes.items() if path.parts[0] in others) < 40e6


def test_the_judge_knows_the_shipped_scenes():
    """And with it the README of weights/demo: the judge that gave its figures is the one that is shipped."""
    net = judge.Judge()
    net.load_state_dict(files.load_file(DEMO / "judge" / "model.safetensors"))
    said = json.loads((DEMO / "references" / "scenes.json").read_text())
    for name, scene in said.items():
        logits = net.float()(to_tensor(isadca.load_image(DEMO / "references" / name)))
        assert {head: judge.HEADS[head][x.argmax().item()] for head, x in logits.items()} == scene


# ---- training ----------------------------------------------------------------------------------------------------

class Desk:
    """A Studio without scenes."""

    device = torch.device("cpu")

    def __init__(self, folder):
        self.state = folder
        folder.mkdir()


def regress(net, rng):
    x = torch.from_numpy(rng.normal(size=(16, 3))).float()
    return (net(x + 0.01 * torch.randn_like(x)) - x.sum(1, keepdim=True)).pow(2).mean()


def test_a_resumed_training_is_the_one_that_was_not_stopped(tmp_path, monkeypatch):
    """Same weights to the last bit: optimiser, average, learning rate and random numbers all go on."""
    def train(folder, stops):
        torch.manual_seed(0)
        net, desk = nn.Linear(3, 1), Desk(folder)
        for stop in stops:
            monkeypatch.setattr(fit.Plan, "rate", lambda plan, step: 0.01 / (1 + step))
            ema = fit.fit("line", net if stop == stops[0] else nn.Linear(3, 1), regress, desk, fit.Plan(stop, 16, 0.01))
        return ema.state_dict()

    straight, resumed = train(tmp_path / "a", [40]), train(tmp_path / "b", [15, 40])
    for key in straight:
        assert torch.equal(straight[key], resumed[key])


def test_the_log_of_a_stopped_training_goes_on_where_the_state_does(tmp_path):
    (tmp_path / "line.csv").write_text("100,0.5\n200,0.4\n300,0.3\n")
    log = fit.Log(tmp_path / "line.csv", first=200)
    for step in range(201, 301):
        log.add(step, 0.25)
    assert (tmp_path / "line.csv").read_text() == "100,0.5\n200,0.4\n300,0.250000\n"


def test_training_learns(tmp_path):
    torch.manual_seed(0)
    ema = fit.fit("line", nn.Linear(3, 1), regress, Desk(tmp_path / "a"), fit.Plan(600, 16, 0.05))
    np.testing.assert_allclose(ema.weight.detach().numpy(), [[1, 1, 1]], atol=0.02)


def test_the_rate_rises_stays_and_falls_to_zero():
    plan = fit.Plan(1000, 1, 0.5, warmup=100)
    rates = [plan.rate(step) for step in range(1000)]
    assert rates[0] == 0.005 and rates[99:800] == [0.5] * 701
    assert np.all(np.diff(rates[:100]) > 0) and np.all(np.diff(rates[800:]) < 0) and 0 < rates[-1] < 0.003
