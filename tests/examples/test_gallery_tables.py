"""measure.py, claims.py and inversion.py: their tables are of what they say, in this process and with few steps."""

import sys
from types import SimpleNamespace

import demo_world as world
import numpy as np
import pytest
import torch
from conftest import ROOT

import isadca

sys.path.insert(0, str(ROOT / "examples" / "methods"))  # the scripts import one another
import claims
import inversion
import measure

HERE = SimpleNamespace(map=map)  # in place of a pool


@pytest.fixture(scope="module", autouse=True)
def started():
    """As each process begins, with two steps; it switches gradients off."""
    was = torch.is_grad_enabled()
    measure.start([], 2)
    yield
    torch.set_grad_enabled(was)


def test_the_scenes_are_those_of_the_pictures():
    """Outside the object a picture is its scene's backdrop, rounded: the region of the backdrop error is right."""
    found = inversion.tasks(40)
    assert len(found) == 10 and {len(task.prompts) for task in found} == {4}
    for task in found:
        error = np.abs(np.asarray(task.picture, float) - world.background(task.scene))[world.outside(task.scene)]
        assert error.max() <= 0.5
        assert task.scene.noun not in {prompt.split()[-1] for prompt in task.prompts}
    assert [len(task.prompts) for task in inversion.tasks(12)] == [2, 2] + [1] * 8


def test_more_iterations_are_more_exact_and_the_textbook_is_less(monkeypatch):
    """The order of the table, at ten steps; one reference."""
    monkeypatch.setattr(inversion, "EXACT", (10,))
    monkeypatch.setattr(inversion, "LONG", 20)
    quality = [psnr for _, (psnr, _) in inversion.exact(inversion.tasks(1)[0])]
    rival, textbook, one, two, _, belm = quality
    assert textbook + 5 < rival and rival + 3 < one < two
    assert belm == inversion.SAME  # in float32


def test_o_belm_is_exact_for_quadratics():
    """Which determines its two coefficients; the levels need not be at one distance."""
    below, here, above = 0.3, 1.1, 2.6
    a, b = inversion.o_belm(below, here, above)
    for x, slope in ((lambda s: 1, lambda s: 0), (lambda s: s, lambda s: 1), (lambda s: s * s, lambda s: 2 * s)):
        assert x(below) == pytest.approx(a * x(above) + (1 - a) * x(here) + b * slope(here), abs=1e-12)


def test_the_textbooks_label_is_the_level_that_is_left():
    """By hand, two steps: from the clean latent with label 0, then from t = 1 with label 1."""
    model = measure.shared["model"]
    ref = isadca.invert(model, inversion.tasks(1)[0].picture, 2)
    chain, context = inversion.textbook(model, ref).chain, model.context([""])
    (high, low), z = model.schedule.steps(2), ref.chain[:1]
    assert (low.t, low.t_prev, high.t_prev) == (1, -499, 1)
    z = model.schedule.inverse_step(z, model.noise(z, 0, context), low)
    torch.testing.assert_close(chain[1:2], z)
    torch.testing.assert_close(chain[2:], model.schedule.inverse_step(z, model.noise(z, 1, context), high))


def test_the_tables_of_variations(monkeypatch):
    monkeypatch.setattr(inversion, "COMPARED", (2, 4))
    rows = [line.split(" | ")[0] for line in inversion.table("steps", 2, 2, HERE).splitlines()]
    assert rows[2:7] == ["| 2 steps", "| 4 steps", "| 2 steps, one iteration", "| 4 steps, one iteration",
                         "| 4 steps up, 2 down"]
    kept = inversion.means(inversion.keep(inversion.tasks(2)[1]))
    errors = {name: row[-1] for name, row in kept.items()}
    best = errors.pop("the reference, through the VAE")
    for lam in (0.5, 0.7, 1.0):
        assert best < errors[f"λ = {lam}, --keep"] < errors[f"λ = {lam}"]


def test_the_gallery_s_table(monkeypatch):
    """The methods that read more than a reference, on one pair: every system has a row, and its own picture."""
    names = ("plain", "attend-and-excite", "plug-and-play", "style-id", "fate-zero")
    monkeypatch.setitem(measure.shared, "systems", {name: measure.systems([])[name] for name in names})
    found = measure.measure([("00-cat.png", "a lemon")])
    assert [row[0] for row in found] == list(names)
    assert len({row[3].tobytes() for row in found}) == len(names)
    assert all(share in (0, 100) for row in found for share in row[-1][:3])
    assert measure.table(found).count("\n") == 1 + len(names)


def test_some_systems_may_be_asked_for():
    assert list(measure.systems([], ["nag", "plain"])) == ["plain", "nag"]
    with pytest.raises(isadca.Problem, match="--only has plan, expected some of plain, "):
        measure.systems([], ["plan"])


def test_a_page_s_table_is_replaced(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nstays\n<!-- end -->\n")
    measure.put("new", page, "x")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- end -->\nb\n<!-- y -->\nstays\n<!-- end -->\n"


def test_each_claim_is_of_a_method_that_exists():
    picture = isadca.load_image(ROOT / "examples" / "pig.png")
    gallery = measure.systems([])
    for name, what, without, with_it in claims.claims(lambda method: ([picture] * 2, 1.0), gallery, picture):
        assert name in gallery and what and np.isfinite([without, with_it]).all()
