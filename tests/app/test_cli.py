"""The command line, in process: what it writes, prints, and how it fails."""

import json
import os

import numpy as np
import pytest
from conftest import DEMO, ROOT
from house import run_python
from PIL import Image

from isadca.app import commands, session
from isadca.app.cli import main
from isadca.app.recipe import read_recipe
from isadca.app.saved_reference import load_reference
from isadca.common.files import save_png
from isadca.common.images import RECIPE_KEY
from isadca.reference import Reference

CAT = str(ROOT / "examples" / "cat.png")


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_vary_writes_a_picture_and_prints_its_path_alone(isadca_cli):
    code, out, err = isadca_cli("vary", CAT, "a lemon", "-o", "out.png")
    assert (code, out) == (0, ["out.png"])
    assert Image.open("out.png").size == (64, 64)
    assert "inverting" in err and "sampling" in err and "100%" in err
    assert os.listdir() == ["out.png"]


def test_quiet_is_quiet(isadca_cli):
    assert isadca_cli("vary", CAT, "a lemon", "-o", "out.png", "-q") == (0, ["out.png"], "")


def test_the_recipe_says_everything_and_makes_the_same_bytes(isadca_cli):
    isadca_cli("vary", CAT, "ein Löwe 🦁", "-o", "out.png", "--lam", "cosine:1:0.5", "--mix", "attention", "--init",
               "shuffle", "--seed", 7, "--layers", "1-3", "--negative", "blur")
    recipe = read_recipe("out.png")
    assert recipe["command"] == "vary" and recipe["args"]["prompt"] == "ein Löwe 🦁" and recipe["args"]["seed"] == 7
    assert {"unet", "vae", "text", "vision", "ip_adapter", "unet config", "scheduler", "tokenizer/vocab.json",
            "tokenizer/merges.txt"} < set(recipe["weights_sha256"])
    assert all(len(digest) == 64 for digest in [*recipe["weights_sha256"].values(), recipe["reference_sha256"]])
    assert set(recipe["versions"]) == {"isadca", "torch", "python"}
    code, out, err = isadca_cli("vary", "--recipe", "out.png", "-o", "again.png", steps=None)
    assert (code, out) == (0, ["again.png"])
    assert open("out.png", "rb").read() == open("again.png", "rb").read()


def test_flags_beside_a_recipe_change_it(isadca_cli):
    isadca_cli("vary", CAT, "a lemon", "-o", "out.png")
    isadca_cli("vary", "--recipe", "out.png", "-o", "other.png", "--lam", "0", steps=None)
    assert read_recipe("other.png")["args"] == read_recipe("out.png")["args"] | {"lam": "0"}
    assert (pixels("out.png") != pixels("other.png")).any()


def test_a_recipe_finds_its_reference_beside_the_picture(isadca_cli, tmp_path, monkeypatch):
    Image.open(CAT).save("mine.png")
    isadca_cli("vary", "mine.png", "a lemon", "-o", "out.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert isadca_cli("vary", "--recipe", "../out.png", "-o", "again.png", steps=None)[0] == 0


def test_a_recipe_refuses_another_reference_or_other_weights(isadca_cli):
    Image.open(CAT).save("mine.png")
    isadca_cli("vary", "mine.png", "a lemon", "-o", "out.png")
    recipe = json.loads(Image.open("out.png").text[RECIPE_KEY])
    Image.new("RGB", (64, 64)).save("mine.png")
    code, _, err = isadca_cli("vary", "--recipe", "out.png", "-o", "again.png", "-q", steps=None)
    assert code == 2 and "is not the reference that out.png was made from" in err
    Image.open(CAT).save("mine.png")
    recipe["weights_sha256"]["unet"] = "0" * 64
    save_png(Image.open("out.png"), "forged.png", recipe)
    code, _, err = isadca_cli("vary", "--recipe", "forged.png", "-o", "again.png", "-q", steps=None)
    assert code == 2 and "made with another unet (sha256 000000000000" in err
    assert not os.path.exists("again.png")


def test_each_picture_of_many_is_the_one_made_alone(isadca_cli):
    code, out, err = isadca_cli("vary", CAT, "a lemon", "-o", "m.png", "--n", 3, "--seed", 5, "--init", "shuffle",
                                "--grid", "grid.png", "-q")
    assert (code, out, err) == (0, ["m-5.png", "m-6.png", "m-7.png", "grid.png"], "")
    isadca_cli("vary", CAT, "a lemon", "-o", "alone.png", "--seed", 6, "--init", "shuffle")
    assert abs(pixels("m-6.png") - pixels("alone.png")).max() <= 1
    isadca_cli("vary", "--recipe", "m-6.png", "-o", "again.png", steps=None)
    assert open("again.png", "rb").read() == open("alone.png", "rb").read()
    assert (pixels("m-5.png") != pixels("m-6.png")).any()
    assert Image.open("grid.png").width > 4 * 128


def test_many_of_the_deterministic_default_says_what_it_does_instead(isadca_cli):
    code, out, err = isadca_cli("vary", CAT, "a lemon", "-o", "m.png", "--n", 2, "-q")
    assert code == 0 and len(out) == 2
    assert f"using --diversity {session.DIVERSITY_OF_MANY}" in err and err.count("\n") == 1
    assert (pixels("m-0.png") != pixels("m-1.png")).any()
    assert read_recipe("m-1.png")["args"]["diversity"] == session.DIVERSITY_OF_MANY


def test_rows_at_once_and_replay_at_once_do_not_change_the_picture(isadca_cli):
    isadca_cli("vary", CAT, "a lemon", "-o", "a.png", "--init", "shuffle", "--n", 2)
    isadca_cli("vary", CAT, "a lemon", "-o", "b.png", "--init", "shuffle", "--n", 2, "--rows-at-once", 1,
               "--replay-at-once", 1)
    for seed in (0, 1):
        assert abs(pixels(f"a-{seed}.png") - pixels(f"b-{seed}.png")).max() <= 1


def test_an_inverted_reference_stands_for_its_picture(isadca_cli, demo):
    code, out, _ = isadca_cli("invert", CAT, "-o", "cat.safetensors")
    assert (code, out) == (0, ["cat.safetensors"])
    isadca_cli("vary", "cat.safetensors", "a lemon", "-o", "a.png", steps=None)
    isadca_cli("vary", CAT, "a lemon", "-o", "b.png")
    assert (pixels("a.png") == pixels("b.png")).all()
    code, _, err = isadca_cli("vary", "cat.safetensors", "a lemon", "-o", "c.png", steps=4)
    assert code == 2 and "--steps is 4, but cat.safetensors was inverted with 3" in err
    assert isinstance(load_reference("cat.safetensors", None), Reference)


def test_any_shape(isadca_cli):
    """--size, --width and --height, and a picture's own; with a mask, from a saved reference, on a sheet."""
    wide = Image.open(CAT).resize((150, 100))
    wide.save("wide.png")
    for flags, size in [(["--size", "96x64"], (96, 64)), (["--width", 32], (32, 64)), (["--fit", "keep"], (80, 48)),
                        (["--size", 48, "--height", 80, "--fit", "squash"], (48, 80)),
                        (["--size", 96, "--fit", "keep", "--also", CAT], (112, 80))]:
        assert isadca_cli("vary", "wide.png", "a lemon", "-o", "a.png", "--mask", CAT, "--keep", CAT, *flags)[0] == 0
        assert Image.open("a.png").size == size
        isadca_cli("vary", "--recipe", "a.png", "-o", "b.png", steps=None)
        assert open("a.png", "rb").read() == open("b.png", "rb").read()
    assert "wide.png is" not in isadca_cli("invert", "wide.png", "-o", "wide.safetensors", "--fit", "keep")[2]
    assert "80×48" in isadca_cli("inspect", "wide.safetensors")[1][0]
    assert isadca_cli("vary", "wide.safetensors", "a lemon", "-o", "a.png", "--grid", "g.png", "--also", CAT,
                      steps=None)[0] == 0
    assert Image.open("a.png").size == (80, 48) and Image.open("g.png").height < 128
    code, _, err = isadca_cli("vary", "wide.safetensors", "a lemon", "-o", "c.png", "--width", 96, "-q", steps=None)
    assert code == 2 and "--size is 96×48, but wide.safetensors was inverted with 80×48" in err
    assert isadca_cli("explore", "wide.png", "a lemon", "-o", "a.html", "--size", "96x64", "--steps", 2)[0] == 0
    page = open("a.html", encoding="utf-8").read()
    assert '"size": [96, 64]' in page and "aspect-ratio: 1" not in page


def test_a_pictures_own_shape_has_its_proportions_and_about_as_many_pixels():
    shapes = {(4000, 3000): (576, 448), (3000, 4000): (448, 576), (512, 512): (512, 512), (640, 480): (576, 448),
              (1080, 1920): (384, 704), (5000, 100): (3648, 64)}
    assert {has: session.own_shape(has, 512 * 512, 64) for has in shapes} == shapes


def test_sweep_has_a_column_per_lam_and_a_row_per_prompt_and_seed(isadca_cli):
    code, out, _ = isadca_cli("sweep", CAT, "a lemon", "a pig", "--lam", "0,0.5,1", "-o", "g.png")
    assert (code, out) == (0, ["g.png"])
    two = Image.open("g.png").size
    isadca_cli("sweep", CAT, "a lemon", "--lam", "0,1", "-o", "g1.png", "--n", 2, "--init", "shuffle")
    one_prompt_two_seeds = Image.open("g1.png").size
    assert two[1] == one_prompt_two_seeds[1] and two[0] - one_prompt_two_seeds[0] == 130


def test_reconstruct_reports_the_psnr(isadca_cli):
    code, out, err = isadca_cli("reconstruct", CAT, "-o", "r.png", "-q", "--steps", 10)
    assert (code, out) == (0, ["r.png"])
    expected = 10 * np.log10(255**2 / np.mean((pixels("r.png") - pixels(CAT)) ** 2.0))
    assert err == f"PSNR {expected:.2f} dB\n" and expected > 20


def test_inspect_and_methods(isadca_cli):
    code, out, _ = isadca_cli("inspect", DEMO)
    assert code == 0 and [line.split(": ")[1].split(",")[0] for line in out] == ["unet", "vae", "text", "ip_adapter",
                                                                                 "vision"]
    code, out, err = isadca_cli("inspect", DEMO / "unet" / "diffusion_pytorch_model.safetensors", CAT)
    assert code == 2 and len(out) == 1 and CAT in err and err.count("\n") == 1
    code, out, _ = isadca_cli("methods")
    names = [line.split(":")[0] for line in out if line[0] != " "]
    assert code == 0 and names == ["isadca", "quick", "rival", "rival-edit", "rival-variation", "ip-adapter",
                                  "masactrl", "plain"]


def test_an_attention_of_ones_own(isadca_cli):
    example = ROOT / "examples" / "my_attention.py"
    assert isadca_cli("vary", CAT, "a lemon", "-o", "a.png", "--method", f"{example}:my_attention")[0] == 0
    isadca_cli("vary", CAT, "a lemon", "-o", "b.png")
    assert (pixels("a.png") != pixels("b.png")).any()


@pytest.mark.parametrize("flags, loaded", [(["--lam", "1"], False), (["--ip-scale", "0"], False), ([], True),
                                           (["--method", "rival"], False), (["--lam", "linear:1:0"], True)])
def test_what_is_idle_is_not_loaded(isadca_cli, monkeypatch, flags, loaded):
    """Seen at the door: what `load` gave to the session, and what the recipe says was read."""
    models, load = [], session.load
    monkeypatch.setattr(session, "load", lambda *args: models.append(load(*args)) or models[-1])
    assert isadca_cli("vary", CAT, "a lemon", "-o", "a.png", *flags)[0] == 0
    assert [(model.ip_adapter is not None, model.vision is not None) for model in models] == [(loaded, loaded)]
    assert ("vision" in read_recipe("a.png")["weights_sha256"]) == loaded
    isadca_cli("invert", CAT, "-o", "a.safetensors")
    assert models[1].ip_adapter is models[1].vision is None


def test_an_encoder_that_had_to_be_guessed_is_named(isadca_cli, monkeypatch):
    monkeypatch.setattr(session, "guess", lambda file, width: f"{file.parent.name}, {width} wide, is a guess")
    width = json.loads((DEMO / "image_encoder" / "config.json").read_text())["hidden_size"]
    code, _, err = isadca_cli("vary", CAT, "a lemon", "-o", "a.png", "-q")
    assert (code, err) == (0, f"isadca: note: image_encoder, {width} wide, is a guess\n")
    assert isadca_cli("vary", CAT, "a lemon", "-o", "b.png", "-q", "--method", "rival")[2] == ""  # not loaded


def test_a_prompt_that_is_too_long_is_used_as_far_as_it_goes(isadca_cli):
    code, _, err = isadca_cli("vary", CAT, "a lemon " * 30 + "and the end", "-o", "a.png", "-q")
    assert code == 0 and "longer than 32 tokens" in err and "and the end" in err


def test_without_an_adapter_it_says_so(isadca_cli):
    code, _, err = isadca_cli("vary", CAT, "a lemon", "-o", "a.png", "-q", "--ip-adapter", "none")
    assert code == 0 and "no IP-Adapter: the DCA branch sees the text alone" in err


@pytest.mark.parametrize("argv, says", [
    (["vary", CAT, "x", "-o", "no/such/a.png"], "the folder no/such does not exist"),
    (["vary", CAT, "x", "-o", "a.jpg"], "expected a name that ends in .png"),
    (["vary", CAT, "-o", "a.png"], "vary needs REF and PROMPT"),
    (["vary", CAT, "x"], "-o"),
    (["vary", "nope.png", "x", "-o", "a.png"], "nope.png: no such picture"),
    (["vary", CAT, "x", "-o", "a.png", "--lam", "2"], "expected 0 to 1"),
    (["vary", CAT, "x", "-o", "a.png", "--lam", "nan"], "expected 0 to 1"),
    (["vary", CAT, "x", "-o", "a.png", "--guidance", "nan"], "guidance is nan"),
    (["vary", CAT, "x", "-o", "a.png", "--k", "1000"], "k is 1000, expected 0 to 999"),
    (["vary", CAT, "x", "-o", "a.png", "--n", "0"], "--n: '0', expected 1 to 10000"),
    (["vary", CAT, "x", "-o", "a.png", "--seed", "-1"], "--seed: '-1', expected 0 to"),
    (["vary", CAT, "x", "-o", "a.png", "--rows-at-once", "0"], "--rows-at-once: '0', expected 1 to 10000"),
    (["vary", CAT, "x", "-o", "a.png", "--layers", "a-b"], "layers"),
    (["vary", CAT, "x", "-o", "a.png", "--method", "magic"], "expected one of isadca, quick"),
    (["vary", CAT, "x", "-o", "a.png", "--mix", "both"], "--mix"),
    (["vary", CAT, "x", "-o", "a.png", "--device", "abacus"], "device 'abacus'"),
    (["vary", CAT, "x", "-o", "a.png", "--dtype", "fp8"], "dtype is 'fp8'"),
    (["vary", CAT, "x", "-o", "a.png", "--weights", "nowhere"], "nowhere: no such file or folder"),
    (["vary", CAT, "x", "-o", "a.png", "--size", "60"], "size is 60"),
    (["vary", CAT, "x", "-o", "a.png", "--method", "a.py:f"], "expected FILE.py:NAME"),
    (["vary", "--recipe", CAT, "-o", "a.png"], "holds no isadca recipe"),
    (["sweep", CAT, "x", "-o", "a.png", "--lam", "0,,1"], "lam is ''"),
    (["reconstruct", CAT, "-o", "a.png", "--steps", "0"], "steps is 0, expected 1 to 999"),
    (["invert", CAT, "-o", "a.png"], "expected a name that ends in .safetensors"),
    (["inspect", "nowhere"], "nowhere: no such file"),
    (["paint"], "invalid choice"),
    ([], "required"),
])
def test_what_cannot_be_done_is_one_line_and_exit_code_2(isadca_cli, argv, says):
    code, out, err = isadca_cli(*argv, steps=None) if argv else (main([]), [], "required\n")
    assert code == 2 and out == [] and says in err
    assert err.count("\n") == 1
    assert os.listdir() == []


def test_ctrl_c_leaves_nothing_and_exits_130(isadca_cli, monkeypatch):
    monkeypatch.setattr(commands, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, out, err = isadca_cli("vary", CAT, "a lemon", "-o", "a.png", "-q")
    assert (code, out, os.listdir()) == (130, [], []) and "interrupted" in err


def test_a_process_of_its_own_is_spared_collections_over_torch(tmp_path):
    """0.3 s of a command; who calls main() with arguments keeps his own garbage collector as it is."""
    code = """
import gc, sys
from isadca.app.cli import main
assert main(["methods"]) == 0 and gc.get_freeze_count() == 0
sys.argv = ["isadca", "methods"]
assert main() == 0 and gc.get_freeze_count() > 0"""
    run_python(code, tmp_path)


def test_a_preview_is_the_picture_so_far(isadca_cli):
    """Written every five steps: the last one is near the picture, and is no picture of its own to --recipe."""
    flags = ["--steps", "6", "--seed", "3", "--init", "random"]
    assert isadca_cli("vary", CAT, "a lemon", "-o", "a.png", *flags, "--preview", "p.png")[0] == 0
    isadca_cli("vary", CAT, "a lemon", "-o", "b.png", *flags)
    assert (pixels("a.png") == pixels("b.png")).all() and read_recipe("a.png") == read_recipe("b.png")
    far, near = (abs(pixels("a.png") - pixels(other)).mean() for other in (CAT, "p.png"))
    assert 0 < near < far
    assert isadca_cli("inspect", "p.png")[0] == 2


@pytest.mark.parametrize("flags, says", [
    (["--preview", "a.png"], "--preview and -o or --grid are both a.png; choose another --preview"),
    (["--preview", CAT], "is the reference itself; choose another --preview"),
    (["--preview", "p.jpg"], "p.jpg: expected a name that ends in .png"),
    (["--preview", "no/p.png"], "the folder no does not exist")])
def test_a_preview_replaces_nothing(isadca_cli, flags, says):
    code, _, err = isadca_cli("vary", CAT, "x", "-o", "a.png", *flags)
    assert code == 2 and says in err
