"""--compile: the UNet is compiled for one row and for several, and never again, whatever changes from step to step.

Counted with the backend "eager", which runs the traced graph as it is: what is traced, and when, is the same for all.
"""

from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_model
from PIL import Image
from torch._dynamo.utils import counters

import isadca
from isadca.app.cli import main
from isadca.app.recipe import made_elsewhere, make_recipe, recipe_flags
from isadca.attention import Site, attend
from isadca.common.problem import Problem
from isadca.loop import Run, sample
from isadca.speed import compiled
from isadca.speed.compiled import CompiledModel, attend_of_the_moment, compile_model

PICTURE = Image.new("RGB", (16, 16), "gray")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How often the UNet was compiled. A graph break would raise: it is compiled as a whole or not at all."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_one_row_and_any_number_of_rows_are_compiled_once_each(tiny):
    """Fifty steps, two prompts, three λ, four seeds, both mixes; and the pictures are the model's own."""
    fast = compile_model(tiny, backend="eager")
    ref = isadca.invert(fast, PICTURE, steps=50)
    assert graphs() == 1
    assert torch.equal(ref.chain, isadca.invert(tiny, PICTURE, steps=50).chain)
    for mix, seeds in ("attention", (0, 1, 2, 3)), ("noise", (0,)):
        runs = [Run(prompt, isadca.Method(mix=mix, lam=lam, init="shuffle"), seeds)
                for prompt in ("a lemon", "a cat") for lam in (0.0, 0.5, 1.0)]
        for z, expected in zip(sample(fast, ref, runs), sample(tiny, ref, runs)):
            torch.testing.assert_close(z, expected, atol=1e-10, rtol=1e-10)
        assert graphs() == 2


def test_half_precision_and_another_size(tiny):
    """A batch of time steps, a text that is not yet projected, another grid."""
    model = tiny_model(torch.bfloat16)
    fast, text = compile_model(model, backend="eager"), model.context(["a", "b"])
    for side in (8, 16):
        z, t = torch.randn(2, 4, side, side), torch.tensor([1, 900])
        assert torch.equal(fast.noise(z, t, text), model.noise(z, t, text))
    assert graphs() == 2


def test_what_attends_may_keep_what_it_gets_and_what_it_returns():
    """Compiled code reuses the memory of both."""
    q, k, v, kept = *(torch.randn(2, 3, 4, 5) for _ in range(3)), []

    def keeps_all(q, k, v, site):
        kept.extend([q, k, v, site])
        return v
    token = compiled._attend.set(keeps_all)
    y = attend_of_the_moment(q, k, v, "up", "self", "up", 3, [2, 2])
    compiled._attend.reset(token)
    assert kept[3] == Site("up", "self", "up", 3, (2, 2))
    assert torch.equal(y, v) and all(map(torch.equal, kept[:3], (q, k, v)))
    assert len({x.data_ptr() for x in (q, k, v, y, *kept[:3])}) == 7


def test_hidden_states_are_edited_in_the_model_itself(tiny):
    fast, z, text = compile_model(tiny, backend="eager"), torch.randn(1, 4, 8, 8).double(), tiny.context(["a"])
    double = lambda h, place: 2 * h
    assert torch.equal(fast.noise(z, 5, text, edit=double), tiny.noise(z, 5, text, edit=double))
    assert graphs() == 0


def test_an_error_in_what_attends_stays_what_it_is(tiny):
    def wrong(q, k, v, site):
        raise Problem("mine")
    fast, z, text = compile_model(tiny, backend="eager"), torch.randn(1, 4, 8, 8).double(), tiny.context(["a"])
    with pytest.raises(Problem, match="^mine$"):
        fast.noise(z, 5, text, wrong)
    assert torch.equal(fast.noise(z, 5, text, attend), tiny.noise(z, 5, text, attend))


def test_a_machine_that_cannot_compile_is_told_so(tiny):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler\nfound")
    fast = compile_model(tiny, backend=no_compiler)
    with pytest.raises(Problem, match="cannot compile here .*no C\\+\\+ compiler.*; leave out --compile") as problem:
        fast.noise(torch.randn(1, 4, 8, 8).double(), 5, tiny.context(["a"]))
    assert "\n" not in str(problem.value) and len(str(problem.value)) <= 290


# ---- where it is asked for -------------------------------------------------------------------------------------

def test_the_flag_compiles_and_its_absence_does_not(folder, monkeypatch, cat):
    cat.save("cat.png")
    asked = []
    monkeypatch.setattr(compiled, "compile_model", lambda model: asked.append(model) or model)
    command = ["vary", "cat.png", "a lemon", "--steps", "1", "--device", "cpu", "-q", "-o"]
    main([*command, "plain.png"])
    assert asked == []
    main([*command, "compiled.png", "--compile"])
    assert len(asked) == 1


def test_load_gives_a_model_that_compiles_later():
    model = isadca.load(device="cpu", compile=True)
    assert isinstance(model, CompiledModel) and repr(model).startswith("<isadca.Model: 64 pixels")
    assert graphs() == 0


def test_a_recipe_says_that_it_was_compiled_and_does_not_ask_for_it(tmp_path):
    args = {"command": "vary", "ref": "cat.png", "prompt": "a lemon", "compile": True, "n": 1}
    recipe = make_recipe(args, "0", {}, "cpu", "float32")
    assert recipe_flags(recipe, "vary", tmp_path)[1] == ["--n=1"]
    assert made_elsewhere(recipe, make_recipe(args | {"compile": False}, "0", {}, "cpu", "float32")) \
        == "compiled True, here False"
