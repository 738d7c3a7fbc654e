"""measure_demo.py: every row of the demo's table can be made, here from a step or two and drawn squares as art."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "examples" / "train_demo"))
import demo_measures as measures
import demo_world as world
import measure_demo

HERE = SimpleNamespace(map=lambda task, tasks: list(map(task, tasks)))  # in place of a pool


@pytest.fixture(scope="module", autouse=True)
def started():
    """As each process begins. It switches gradients off."""
    was, threads = torch.is_grad_enabled(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        art = {(noun, style): Image.new("RGBA", (128, 128), "red") for noun in world.NOUNS for style in world.STYLES}
        patch.setattr(world, "fetch_art", lambda folder: art)
        measures.start(DEMO, None, steps=1)
        yield
    torch.set_grad_enabled(was)
    torch.set_num_threads(threads)


@pytest.fixture
def short(monkeypatch):
    """One seed, no search for the guidance."""
    monkeypatch.setattr(measure_demo, "SEEDS", [100])
    monkeypatch.setattr(measure_demo, "best_guidance", lambda pool, task, guidances: guidances[0])


@pytest.mark.parametrize("name, rows", [
    ("text", 1), *(pytest.param(name, rows, marks=pytest.mark.slow)
                   for name, rows in (("controlnet", 1), ("variations", 1), ("adapter", 2)))])
def test_a_row_of_drawn_pictures(short, name, rows):
    text = measure_demo.ROWS[name](HERE)
    assert text.count("\n") == rows - 1 and all(line.count("|") == 4 and " % (" in line for line in text.splitlines())


def test_the_clip_pair_finds_nouns_in_squares_no_better_than_chance():
    """And colours and patterns of the backdrop nearly always: the texts' encoder is the trained one, with its head."""
    found = measures.measure_clip(100, n=16)
    noun, colour, pattern = (sum(answers[i] for answers in found) for i in range(3))
    assert noun <= 4 and colour >= 12 and pattern >= 10
