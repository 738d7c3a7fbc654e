"""Method by itself, without a network: its defaults, what it says of a step, what it refuses, and the presets."""

import math
from dataclasses import MISSING, fields

import pytest
import torch

from isadca import PRESETS, Cosine, Linear, Method, Problem, Run
from isadca.methods import method_named

INF, NAN = float("inf"), float("nan")
DEFAULTS = dict(name="isadca", lam=0.7, mix="noise", before_step=None, edit=None, guidance=7.0, k=0, t_start=1000,
                replace_above=1000, adain_above=1000, layers=None, ref_rows=1, ref_maps=False, ip_scale=1.0,
                ip_layers=None, init="inverted", steps=50, diversity=0.0)
RIVAL = dict(lam=1.0, replace_above=601, adain_above=600, ip_scale=0.0)  # t_align 600; attention is joined from 601 on
CHANGED = {  # what a preset changes, from its authors' configuration
    "isadca": {}, "quick": dict(steps=10),
    "rival": RIVAL | dict(init="shuffle", t_start=961), "rival-edit": RIVAL | dict(t_start=901),
    "rival-variation": RIVAL | dict(init="shuffle", guidance=5.0, ref_rows=2),
    "ip-adapter": dict(lam=0.0, guidance=7.5, init="random"),
    "masactrl": dict(lam=1.0, guidance=7.5, replace_above=-1, t_start=901, layers=(-6, -5, -4, -3, -2, -1),
                     ip_scale=0.0),
    "plain": dict(lam=0.0, guidance=7.5, init="random", ip_scale=0.0)}


def test_the_presets_are_their_authors():
    assert list(PRESETS) == list(CHANGED)
    for name, method in PRESETS.items():
        values = {field.name: getattr(method, field.name) for field in fields(Method) if field.name != "source"}
        assert values == DEFAULTS | {"name": name} | CHANGED[name], name


def test_the_defaults_are_the_papers():
    assert {field.name: field.default for field in fields(Method) if field.name != "source"} == DEFAULTS
    assert all(field.default is not MISSING for field in fields(Method))
    assert (Run("a").method, Run("a").seeds, Run("a").negative) == (Method(), (0,), "")
    assert Method().source.startswith("the paper, Algorithm 1")


def test_which_fields_are_flags():
    """Each has its words; the choices are listed in this order."""
    flags = {field.name: field.metadata["choices"] for field in fields(Method) if "help" in field.metadata}
    choices = {"mix": ("noise", "attention"), "init": ("inverted", "shuffle", "gaussian", "random")}
    assert flags == {name: choices.get(name) for name in (
        "lam", "mix", "guidance", "k", "t_start", "replace_above", "adain_above", "layers", "ip_scale", "ip_layers",
        "init", "diversity")}
    for field in fields(Method):
        assert len(field.metadata["about"]) > 5 and field.metadata["about"] == field.metadata.get(
            "help", field.metadata["about"])


def test_the_docstring_tells_each_field():
    first, *lines = Method.__doc__.split("\n\n")
    assert first.startswith("What one run does")
    assert lines == [f"{field.name}: {field.metadata['about']}" for field in fields(Method)]


# ---- one step ------------------------------------------------------------------------------------------------------

def test_control_is_on_above_k_and_up_to_t_start():
    method = Method(k=200, t_start=901)
    assert [method.is_active(t) for t in (200, 201, 901, 902)] == [False, True, True, False]


def test_the_reference_alone_is_seen_above_the_threshold():
    method = Method(replace_above=601)
    assert [method.isa_mode(t) for t in (602, 601, 600)] == ["replace", "append", "append"]


@pytest.mark.parametrize("changes, reads", [
    ({}, {1: True, 1000: True}), (dict(k=500), {500: False, 501: True}), (dict(t_start=400), {400: True, 401: False}),
    (dict(lam=0.0), {1: False, 1000: False}), (dict(lam=1e-9), {1: True}), (dict(lam=0.0, mix=print), {1: True}),
    (dict(t_start=400, adain_above=700), {400: True, 401: False, 700: False, 701: True}),
    (dict(lam=0.0, adain_above=700), {701: False}), (dict(lam=lambda t, T: float(t > 600)), {600: False, 601: True})])
def test_when_the_reference_is_read(changes, reads):
    """In the controlled steps with λ > 0, and where its noise aligns ours."""
    assert {t: Method(**changes).wants_reference(t, 1000) for t in reads} == reads


@pytest.mark.parametrize("changes, wants", [
    ({}, True), (dict(lam=1), False), (dict(lam=0), True), (dict(ip_scale=0), False), (dict(ip_scale=-1), True),
    (dict(lam=1, mix=print), True), (dict(lam=1, mix=print, ip_scale=0), False), (dict(lam=Linear(1, 0)), True)])
def test_when_the_image_prompt_is_read(changes, wants):
    assert Method(**changes).wants_image is wants


@pytest.mark.parametrize("init, diversity, same", [
    ("inverted", 0, True), ("inverted", 0.1, False), ("inverted", 1, False), ("shuffle", 0, False),
    ("random", 0, False), ("gaussian", 1, False)])
def test_when_every_seed_gives_the_same_picture(init, diversity, same):
    assert Method(init=init, diversity=diversity).deterministic is same


# ---- λ ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lam", [-1e-9, 1 + 1e-9, -1, 2, NAN, "0.5", lambda t, T: 1.5, torch.tensor(1.5),
                                 torch.rand(2), torch.rand(0)])
def test_lam_is_from_0_to_1(lam):
    with pytest.raises(Problem, match=r"lam is .* at t = 7, expected 0 to 1"):
        Method(lam=lam).lam_at(7, 1000)


def test_lam_may_depend_on_the_step():
    assert [Method(lam=lam).lam_at(250, 1000) for lam in (0, 1, 0.7, lambda t, T: t / T)] == [0, 1, 0.7, 0.25]
    for lam in (torch.tensor(0.5, requires_grad=True), torch.tensor([0.5])):
        assert Method(lam=lam).lam_at(250, 1000) is lam


def test_schedules_of_lam():
    """At the ends, half way and a quarter of it; the cosine is slow at both ends."""
    line, wave = Linear(0.9, 0.1), Cosine(0.9, 0.1)
    for schedule in (line, wave):
        assert schedule(1000, 1000) == pytest.approx(0.9, abs=1e-12) and schedule(0, 1000) == pytest.approx(0.1)
        assert schedule(500, 1000) == pytest.approx(0.5) and schedule(25, 50) == pytest.approx(0.5)
    assert line(250, 1000) == pytest.approx(0.3)
    assert wave(250, 1000) == pytest.approx(0.1 + 0.8 * math.sin(math.pi / 8) ** 2)


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, says", [
    (dict(guidance=INF), "guidance is inf, expected a finite number"), (dict(guidance=NAN), "guidance is nan"),
    (dict(guidance="7"), "guidance is '7', expected a number such as 7$"),
    (dict(ip_scale=-INF), "ip_scale is -inf, expected a finite number"),
    (dict(ip_scale=None), "ip_scale is None, expected a number such as 1$"),
    (dict(k=-1), "k is -1, expected 0 to 999; control is on for t > k"), (dict(k=1000), "k is 1000, expected 0 to 999"),
    (dict(k=5, t_start=5), "t_start is 5, expected more than k, which is 5"),
    (dict(t_start="x"), "t_start is 'x', expected a number such as 1000"),
    (dict(ref_rows=0), "ref_rows is 0, expected 1 or 2"), (dict(ref_rows=3), "ref_rows is 3, expected 1 or 2"),
    (dict(diversity=-0.1), "diversity is -0.1, expected 0 to 1"), (dict(diversity=1.1), "diversity is 1.1"),
    (dict(init="noise"), "init is noise, expected inverted or shuffle or gaussian or random"),
    (dict(mix="latents"), "mix is latents, expected noise or attention"), (dict(mix=None), "mix is None"),
    (dict(lam=2), "lam is 2 at t = 1000, expected 0 to 1"), (dict(lam=None), "lam is None at t = 1000"),
    (dict(lam=[0.5]), r"lam is \[0.5\] at t = 1000, expected 0 to 1")])
def test_what_cannot_be_is_named(changes, says):
    with pytest.raises(Problem, match=says):
        Method(**changes).check(1000, 4)


@pytest.mark.parametrize("changes", [
    dict(guidance=0), dict(guidance=-3.5), dict(k=999), dict(k=0, t_start=1), dict(ref_rows=1), dict(ref_rows=2),
    dict(diversity=0), dict(diversity=1), dict(diversity=True), dict(mix="attention"), dict(mix=print), dict(lam=0),
    dict(lam=1), dict(lam=lambda t, T: 5), dict(ip_scale=0), dict(init="shuffle"), dict(init="gaussian"),
    dict(init="random")])
def test_the_ends_of_each_range_are_fine(changes):
    """A λ that depends on the step is looked at in each."""
    assert Method(**changes).check(1000, 4) == Method(**changes)


@pytest.mark.parametrize("field", ["layers", "ip_layers"])
def test_layers_are_counted_from_either_end(field):
    of = lambda *layers: getattr(Method(**{field: layers}).check(1000, 4), field)
    assert of(0, 3) == (0, 3) and of(-4, -1) == (0, 3) and of() == ()
    for wrong in (4, -5, "1", 1.0):
        with pytest.raises(Problem, match=rf"{field} is \({wrong!r},\), expected some of 0 to 3: this UNet has 4"):
            of(wrong)
    assert getattr(Method(**{field: (7,)}).check(1000), field) == (7,)  # no UNet is known yet
    assert Method().check(1000, 4).layers is None


def test_a_preset_is_found_by_its_name():
    assert method_named("rival") is PRESETS["rival"]
    with pytest.raises(Problem, match="method is 'rivall', expected one of isadca, quick, rival, "):
        method_named("rivall")
    with pytest.raises(Problem, match="method is 7, expected a Method or the name of a preset"):
        method_named(7)
