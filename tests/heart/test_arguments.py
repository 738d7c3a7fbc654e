"""What `load`, `invert`, `vary` and `sample` say of arguments that they do not take: one line that names it."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DEMO
from PIL import Image

import isadca
from isadca import Method, Problem, Run, invert, replay, sample, vary
from isadca.common.images import RECIPE_KEY
from isadca.networks.model import Model

TENSOR = torch.rand(3, 64, 64)
WRONG = {  # of vary, beside the model, a reference and "a lemon"
    "ref a tensor": (dict(ref=TENSOR), "image is of type Tensor, expected a picture or its path"),
    "ref None": (dict(ref=None), "image is None, expected a picture or its path"),
    "seeds 1.5": (dict(seeds=1.5), "seeds is 1.5, expected whole numbers"),
    "seeds [1.5]": (dict(seeds=[1.5]), "seeds is 1.5, expected whole numbers"),
    "seeds '3'": (dict(seeds="3"), "seeds is '3', expected whole numbers"),
    "no seeds": (dict(seeds=[]), "seeds is empty"),
    "prompt None": (dict(prompt=None), "prompt or negative is None, expected a text"),
    "prompts with None": (dict(prompt=["a", None]), "prompt or negative is None, expected a text"),
    "an embedding of one batch": (dict(prompt=torch.rand(1, 12, 24)), r"prompts are \[\(12, 24\), \(1, 12, 24\)\], "),
    "an embedding alone": (dict(prompt=torch.rand(1, 12, 24), guidance=1), r"prompts are \[\(1, 12, 24\)\], expected"),
    "an embedding too wide": (dict(prompt=torch.rand(12, 25), guidance=1), r"expected embeddings \(tokens, 24\), as"),
    "an embedding too short": (dict(prompt=torch.rand(3, 24)), r"prompts are \[\(12, 24\), \(3, 24\)\], expected"),
    "a λ for each": (dict(lam=torch.rand(2)), r"lam is tensor\(.*\) at t = 1000, expected 0 to 1"),
    "a layer": (dict(layers=0), "layers is 0, expected some of 0 to "),
    "masks": (dict(mask=torch.rand(2, 16, 16)), r"mask or keep is \(2, 16, 16\), expected a tensor \(h,w\)"),
    "a keep of one batch": (dict(keep=torch.rand(1, 1, 8, 8)), r"mask or keep is \(1, 1, 8, 8\), expected"),
    "no prompts": (dict(prompt=[]), r"prompt or negative is \[\], expected a text"),
    "negative None": (dict(negative=None), "prompt or negative is None, expected a text"),
    "guidance_scale": (dict(guidance_scale=7), r"guidance_scale is no option; did you mean guidance\?"),
    "num_inference_steps": (dict(num_inference_steps=7), r"did you mean steps\?"),
    "negative_prompt": (dict(negative_prompt="x"), r"did you mean negative\?"),
    "seed": (dict(seed=3), r"did you mean seeds\?"),
    "guidanc": (dict(guidanc=3), r"did you mean guidance\?"),
    "nonsense": (dict(xyz=3), r"xyz is no option"),
    "lam a text": (dict(lam="0.5"), "lam is '0.5' at t = 1000, expected 0 to 1"),
    "layers a text": (dict(layers="1-2"), r"layers is '1-2', expected some of 0 to \d"),
    "guidance a text": (dict(guidance="7"), "guidance is '7', expected a number such as 7"),
    "mask a path": (dict(mask="cat.png"), "mask or keep is 'cat.png', expected a tensor"),
    "keep a picture": (dict(keep=Image.new("L", (64, 64))), "mask or keep is .*, expected a tensor"),
    "also a path": (dict(also=["cat.png"]), "also is 'cat.png', expected a list of what isadca.invert gives"),
    "also no list": (dict(also=5), "also is 5, expected a list of what isadca.invert gives"),
    "method a number": (dict(method=0.5), "method is 0.5, expected a Method or the name of a preset"),
    "method the class": (dict(method=Method), "method is .*, expected a Method or the name of a preset"),
    "method unknown": (dict(method="rivall"), "method is 'rivall', expected one of isadca"),
    "model a text": (dict(model="demo"), "model is 'demo', expected what isadca.load gives"),
    "other steps": (dict(steps=4), "steps is 4, the reference was inverted with 6")}


@pytest.mark.parametrize("case", WRONG)
def test_vary_names_what_it_does_not_take(tiny, tiny_ref, case):
    given, says = WRONG[case]
    with pytest.raises(Problem, match=says):
        vary(**dict(model=tiny, ref=tiny_ref, prompt="a lemon") | given)


@pytest.mark.parametrize("given, says", [
    (dict(image=TENSOR), "image is of type Tensor"), (dict(model=None), "model is None"),
    (dict(steps="4"), "steps is '4', expected a whole number"), (dict(steps=4.0), "steps is 4.0"),
    (dict(size="96x64"), r"size is '96x64', expected a side in pixels, or \(width, height\)")])
def test_invert_names_what_it_does_not_take(tiny, tiny_ref, given, says):
    with pytest.raises(Problem, match=says):
        invert(**dict(model=tiny, image=tiny_ref.image, steps=1) | given)


@pytest.mark.parametrize("given, says", [
    (dict(weights=7), "weights is 7, expected a path"), (dict(weights=b"x"), "weights is b'x', expected a path"),
    (dict(weights=""), "has no unet folder"), (dict(dtype=torch.int8), "dtype is torch.int8, expected auto, fp32"),
    (dict(dtype=torch.complex64), "dtype is torch.complex64")])
def test_load_names_what_it_does_not_take(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)  # "" is this folder
    with pytest.raises(Problem, match=says):
        isadca.load(**given)


def test_numbers_of_numpy_are_numbers(tiny, tiny_ref):
    [one], [two] = (vary(tiny, tiny_ref, "a lemon", init="random", seeds=seeds) for seeds in (3, np.int64(3)))
    assert one.tobytes() == two.tobytes()
    assert len(vary(tiny, tiny_ref, ("a lemon", "a pig"), seeds=np.arange(2), guidance=np.float64(7))) == 4


def test_an_embedding_takes_the_models_precision(tiny, tiny_ref):
    embedding = tiny.context(["a lemon"])[0].float()
    one, two = (vary(tiny, tiny_ref, x, init="random")[0].tobytes() for x in (embedding, embedding.double()))
    assert one == two


def test_a_reference_is_one_line(tiny_ref):
    assert repr(tiny_ref) == "<isadca.Reference: 16×16, 6 steps, ''>"


def test_a_pictures_recipe_has_the_references_steps(tiny, tiny_ref):
    [picture] = vary(tiny, tiny_ref, "a lemon")
    recipe = picture.info[RECIPE_KEY]
    assert "steps=6" in recipe["run"] and (recipe["command"], len(recipe)) == ("isadca.vary", 2)


def test_a_model_without_an_adapter_reads_no_image(tiny, tiny_ref, monkeypatch):
    """Nor does one whose methods want none."""
    monkeypatch.setattr(Model, "image_tokens", None)
    alone = replace(tiny, ip_adapter=None, vision=None)
    for model, method in ((alone, Method()), (tiny, Method(lam=1))):
        assert sample(model, tiny_ref, [Run("a lemon", method)])[0].isfinite().all()


# ---- replays that do not fit ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("of_another", [dict(steps=3), dict(steps=6, size=(32, 16))])
def test_a_second_reference_of_other_steps_or_size_is_refused(tiny, tiny_ref, of_another):
    """The steps that both have would be read at other levels."""
    other = invert(tiny, tiny_ref.image, **of_another)
    for first, second in ((tiny_ref, other), (other, tiny_ref)):
        says = f"a second reference is {second!r}, the first {first!r}; invert both with equal steps and size"
        with pytest.raises(Problem, match=re.escape(says)):
            sample(tiny, first, [Run("a lemon")], also=[second])


def test_a_second_reference_is_not_read_where_no_method_wants_it(tiny, tiny_ref):
    sample(tiny, tiny_ref, [Run("a lemon", Method(k=500))], also=[tiny_ref])


def test_a_replay_that_is_longer_is_refused_whatever_it_is(tiny, tiny_ref):
    short = invert(tiny, tiny_ref.image, 3)
    for replayed, seen in ((replay(tiny, tiny_ref), 4), (list(replay(tiny, tiny_ref)), 6)):  # the first is stopped
        with pytest.raises(Problem, match=f"replayed has {seen} steps, the reference has 3"):
            sample(tiny, short, [Run("a lemon")], replayed=replayed)


def test_a_replay_that_lacks_what_is_read_is_refused(tiny, tiny_ref):
    def fails(replayed, **changes):
        with pytest.raises(Problem, match="replayed lacks what the method reads at a step"):
            sample(tiny, tiny_ref, [Run("a lemon", Method(**changes))], replayed=replayed)
    fails([None] * 6)
    fails(list(replay(tiny, tiny_ref)), ref_rows=2)
    fails(list(replay(tiny, tiny_ref)), ref_maps=True)
    fails(list(replay(tiny, tiny_ref, lambda t: t > 500)))
    sample(tiny, tiny_ref, [Run("a lemon", Method(k=500))], replayed=list(replay(tiny, tiny_ref, lambda t: t > 500)))


# ---- the picture that the image prompt's encoder sees --------------------------------------------------------------

def test_the_image_prompt_sees_the_whole_picture(tmp_path):
    """However it was fitted for the VAE, and also from a saved reference: λ = 0 from noise reads nothing else."""
    model = isadca.load(DEMO, device="cpu")
    wide = Image.effect_noise((160, 64), 90).convert("RGB")
    wide.paste("red", (0, 0, 40, 64))
    refs = [invert(model, wide, 2, fit_by=how) for how in ("crop", "squash")]
    isadca.save_reference(refs[1], tmp_path / "ref.safetensors", "x")
    refs.append(isadca.load_reference(tmp_path / "ref.safetensors"))
    assert refs[0].image.tobytes() != refs[1].image.tobytes()
    run = Run("a lemon", Method(lam=0, init="random"))
    [first], *others = (sample(model, ref, [run]) for ref in refs)
    for [other] in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    [squashed] = sample(model, invert(model, refs[1].image, 2), [run])  # nothing but the squashed picture to see
    assert not torch.allclose(squashed, first, atol=1e-3)
