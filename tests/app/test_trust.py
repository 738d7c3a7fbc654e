"""Hostile and unlucky use: nothing that the user has is replaced, nothing waits or grows without bound, and each
refusal is one short line. Tables in the manner of test_bad_input.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import CAT, refused, vary
from conftest import DEMO
from PIL import Image

from isadca.app import saved_reference, session
from isadca.app.cli import main
from isadca.app.recipe import read_recipe
from isadca.common.files import save_png
from isadca.common.problem import Problem

DIGITS = "9" * 5000
LONG = "x" * 100_000


# --- recipes ------------------------------------------------------------------------------------------------------

KEYS = ["gri", "grid=sto", "out=sto", "o", "outt", "GRID", "--grid", "grid sto", "log=sto", "overwrit", "helpp", "help",
        "n=3", "weights=x", "re", "rec", "quie", "words", "version", "", "\0", "é", "attend=x", LONG]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:12])
def test_a_recipe_sets_only_flags_that_it_may(folder, capsys, key):
    args = {"ref": CAT, "prompt": "a lemon", key: "stolen.png"}
    save_png(Image.open(CAT), folder / "x.png", {"command": "vary", "args": args, "weights_sha256": {}})
    assert len(refused(capsys, ["vary", "--recipe", folder / "x.png", "-o", "a.png"], str(folder / "x.png"))) <= 300


WHOLE = {  # a forged recipe, and what the line says
    "no args": ({"command": "vary", "weights_sha256": {}}, "its recipe is damaged"),
    "args a list": ({"command": "vary", "args": [1], "weights_sha256": {}}, "its recipe is damaged"),
    "another command": ({"command": "rm"}, "was made by isadca rm, expected isadca vary"),
    "a long command": ({"command": LONG}, "was made by isadca xxx"),
    "NUL in the reference": ({"command": "vary", "args": {"ref": "a\0b", "prompt": "x"}, "weights_sha256": {}},
                             "its recipe is damaged"),
    "NUL in the weights": ({"command": "vary", "args": {"ref": CAT, "prompt": "x", "weights": "a\0b"},
                            "weights_sha256": {}}, "--weights is"),
    "hashes a list": ({"command": "vary", "args": {"ref": CAT, "prompt": "x"}, "weights_sha256": []}, "is damaged"),
    "other reference": ({"command": "vary", "args": {"ref": CAT, "prompt": "x"}, "weights_sha256": {},
                         "reference_sha256": [1]}, "is not the reference"),
    "a method of code": ({"command": "vary", "args": {"ref": CAT, "prompt": "x", "method": "x.py:f"},
                          "weights_sha256": {}}, "made with --method x.py:f; give the flag again to run that code"),
    "steps nested": ({"command": "vary", "args": {"ref": CAT, "prompt": "x", "steps": {"a": [1]}},
                      "weights_sha256": {}}, "--steps: invalid int value"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_forged_recipes(folder, capsys, case):
    recipe, says = WHOLE[case]
    save_png(Image.open(CAT), folder / "x.png", recipe)
    assert len(refused(capsys, ["vary", "--recipe", folder / "x.png", "-o", "a.png", "-q"], says)) <= 300


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1]", "null", "NaN", '"x"', "{", "\ud800"])
def test_recipes_that_are_no_recipe(folder, capsys, text):
    from PIL import PngImagePlugin
    info = PngImagePlugin.PngInfo()
    info.add_itxt("isadca", text.encode("utf-8", "replace").decode())
    Image.open(CAT).save(folder / "x.png", pnginfo=info)
    refused(capsys, ["vary", "--recipe", folder / "x.png", "-o", "a.png"], "holds no isadca recipe")


# --- nothing is lost ----------------------------------------------------------------------------------------------

MINE = {  # the command, run where all of these files are the user's
    "a numbered picture": ["vary", "a-0.png", "x", "-o", "a.png", "--n", "2"],
    "the sheet": ["vary", "cat.png", "x", "-o", "b.png", "--n", "2", "--grid", "cat.png"],
    "the sheet over a numbered picture": ["vary", "cat.png", "x", "-o", "a.png", "--n", "2", "--grid", "a-1.png"],
    "a link": ["vary", "cat.png", "x", "-o", "link.png"],
    "a hard link": ["vary", "cat.png", "x", "-o", "hard.png"],
    "a link as the reference": ["vary", "link.png", "x", "-o", "cat.png"],
    "the sheet over the recipe": ["vary", "--recipe", "made.png", "-o", "b.png", "--grid", "made.png"],
    "the recipe": ["vary", "--recipe", "made.png", "-o", "made.png"],
    "sweep": ["sweep", "cat.png", "x", "-o", "cat.png"],
    "sweep, by a link": ["sweep", "link.png", "x", "-o", "cat.png"],
    "reconstruct": ["reconstruct", "cat.png", "-o", "cat.png"],
    "explore": ["explore", "cat.html", "x", "-o", "cat.html"],
    "invert": ["invert", "cat.safetensors", "-o", "cat.safetensors"],
    "invert over the weights": ["invert", "cat.png", "-o", "w/unet/model.safetensors", "--weights", "w"],
    "convert": ["convert", "m.safetensors", "-o", "m.safetensors"],
    "convert, by a link": ["convert", "m.safetensors", "-o", "n.safetensors"],
    "the log over the reference": ["vary", "cat.png", "x", "-o", "b.png", "--log", "cat.png"],
    "the log over the code": ["vary", "cat.png", "x", "-o", "b.png", "--log", "f.py", "--method", "f.py:f"],
    "a folder where a picture would be": ["vary", "cat.png", "x", "-o", "d.png", "--n", "2"],
    "a loop of links": ["vary", "cat.png", "x", "-o", "loop/x.png"],
    "a pipe": ["vary", "cat.png", "x", "-o", "pipe.png"],
    "a device": ["vary", "cat.png", "x", "-o", "b.png", "--grid", "/dev/null"],
    "a name that is too long": ["vary", "cat.png", "x", "-o", f"{'a' * 252}.png"],
    "a pipe as the reference": ["vary", "pipe.png", "x", "-o", "b.png"],
    "a pipe as the weights": ["vary", "cat.png", "x", "-o", "b.png", "--weights", "pipe.png"],
    "a pipe as the recipe": ["vary", "--recipe", "pipe.png", "-o", "b.png"],
    "a pipe as the adapter": ["vary", "cat.png", "x", "-o", "b.png", "--ip-adapter", "pipe.png"],
    "a pipe as the code": ["vary", "cat.png", "x", "-o", "b.png", "--method", "pipe.py:f"],
    "a pipe to inspect": ["inspect", "pipe.png"], "a pipe to convert": ["convert", "pipe.png", "-o", "b.safetensors"],
    "two pictures, one file": ["vary", "cat.png", "a-0.png", "x", "-o", "b.png"],
    "a folder without pictures": ["vary", "w", "x", "-o", "d-1.png"],
    "a folder for one file": ["vary", "w", "x", "-o", "b.png"],
    "the same name twice": ["vary", "cat.png", "./cat.png", "x", "-o", "d-1.png"],
    "a sheet in a folder": ["vary", "cat.png", "x", "-o", "d-1.png", "--grid", "b.png"],
    "one word": ["vary", "cat.png", "-o", "b.png"],
    "a recipe of nothing": ["vary", "--recipe", "cat.png", "-o", "b.png"],
}


@pytest.fixture(scope="module")
def users_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    for name in ("a-0.png", "cat.png", "cat.html"):
        shutil.copy(CAT, folder / name)
    (folder / "link.png").symlink_to("cat.png")
    os.link(folder / "cat.png", folder / "hard.png")
    save_png(Image.open(CAT), folder / "made.png",
             {"command": "vary", "args": {"ref": CAT, "prompt": "a lemon"}, "weights_sha256": {}})
    (folder / "w" / "unet").mkdir(parents=True)
    for name in ("m.safetensors", "cat.safetensors", "w/unet/model.safetensors"):
        (folder / name).write_bytes(b"mine")
    (folder / "n.safetensors").symlink_to("m.safetensors")
    (folder / "d-1.png").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "f.py").write_text("def f(controls):\n    return controls.kernel\n")
    os.mkfifo(folder / "pipe.png")
    os.link(folder / "pipe.png", folder / "pipe.py")
    return folder


@pytest.mark.parametrize("case", MINE)
def test_what_the_user_has_is_not_replaced(users_files, monkeypatch, capsys, case):
    """Nothing is computed either: the model is not loaded."""
    monkeypatch.chdir(users_files)
    if "-o d-1.png" not in " ".join(MINE[case]):
        monkeypatch.setattr(session, "load", None)
    before = {path: path.read_bytes() for path in users_files.rglob("*") if path.is_file()}
    assert len(refused(capsys, MINE[case])) <= 300
    assert {path: path.read_bytes() for path in users_files.rglob("*") if path.is_file()} == before


# --- what went in -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def own_weights(tmp_path_factory):
    """A copy of the demo, a picture and a saved reference that were made with it."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(DEMO, folder / "w", ignore=shutil.ignore_patterns("pairs", "metrics", "references", "*.csv"))
    shutil.copy(CAT, folder / "cat.png")
    flags = ["--weights", f"{folder}/w", "-q", "--steps", "2"]
    assert main(["vary", f"{folder}/cat.png", "a lemon", "-o", f"{folder}/made.png", *flags]) == 0
    assert main(["invert", f"{folder}/cat.png", "-o", f"{folder}/saved.safetensors", *flags]) == 0
    return folder


@pytest.mark.parametrize("file, part", [
    ("scheduler/scheduler_config.json", "scheduler"), ("tokenizer/merges.txt", "tokenizer/merges.txt"),
    ("tokenizer/vocab.json", "tokenizer/vocab.json"), ("unet/config.json", "unet config"),
    ("text_encoder/config.json", "text config"), ("vae/config.json", "vae config")])
def test_what_changed_since_is_named(own_weights, folder, capsys, file, part):
    path = own_weights / "w" / file
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    try:
        refused(capsys, ["vary", "--recipe", own_weights / "made.png", "-o", "a.png", "-q"],
                f"made with another {part} ")
        refused(capsys, ["vary", own_weights / "saved.safetensors", "x", "-o", "a.png", "-q", "--weights",
                         own_weights / "w"], f"inverted with other weights (another {part})")
    finally:
        path.write_bytes(before)


def test_another_machine_is_noted(own_weights, folder, capsys):
    recipe = read_recipe(own_weights / "made.png") | {"threads": 64, "batch": 5}
    save_png(Image.open(CAT), folder / "x.png", recipe)
    assert main(["vary", "--recipe", str(folder / "x.png"), "-o", "a.png", "-q"]) == 0
    assert "threads 64, here 1, batch 5, here 1: a pixel may differ by one grey level" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cat.png", "mask.png"])
def test_a_picture_that_changes_while_it_is_read(folder, capsys, monkeypatch, name):
    """Its recipe would name another one."""
    shutil.copy(CAT, folder / "cat.png")
    shutil.copy(CAT, folder / "mask.png")
    load_image = session.load_image

    def and_it_changes(path, *more):
        image = load_image(path, *more)
        if Path(path).name == name:
            Image.new("RGB", (8, 8)).save(path)
        return image
    monkeypatch.setattr(session, "load_image", and_it_changes)
    refused(capsys, [*vary(ref=folder / "cat.png"), "--mask", folder / "mask.png"],
            f"{name}: changed while it was read; run it again")


def test_a_saved_reference_that_may_not_be_read_is_not_just_called_damaged(folder, monkeypatch):
    def denied(path, framework):
        raise PermissionError(13, "Permission denied")
    (folder / "a.safetensors").write_bytes(bytes(8))
    monkeypatch.setattr(saved_reference, "safe_open", denied)
    with pytest.raises(Problem, match=r"may not be read \(.*denied\); invert the picture again, or look at its perm"):
        saved_reference.load_reference(folder / "a.safetensors")


def test_a_reference_that_goes_away_is_certified_as_it_was(folder, capsys, monkeypatch):
    shutil.copy(CAT, folder / "cat.png")
    sample = session.sample

    def and_it_goes(*args, **options):
        (folder / "cat.png").unlink()
        return sample(*args, **options)
    monkeypatch.setattr(session, "sample", and_it_goes)
    assert main(vary(ref=str(folder / "cat.png"))) == 0
    import hashlib
    assert read_recipe("a.png")["reference_sha256"] == hashlib.sha256(Path(CAT).read_bytes()).hexdigest()


# --- streams ------------------------------------------------------------------------------------------------------

def test_a_reader_that_leaves_does_not_stop_the_work(folder):
    """`2>&1 | head -c 20` closes both streams while the bars are drawn."""
    command = f"{sys.executable} -m isadca vary {CAT} lemon -o a.png --steps 2 --n 2 --init shuffle 2>&1 | head -c 20"
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=300)
    assert sorted(os.listdir()) == ["a-0.png", "a-1.png"]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["none", "full", "closed", "ascii"])
def test_streams_that_do_not_take_it(folder, monkeypatch, kind, name):
    streams = {"none": lambda: None, "full": lambda: open("/dev/full", "w"), "ascii":
               lambda: open(folder / "seen", "w", encoding="ascii"), "closed": lambda: open(folder / "seen", "w")}
    stream = streams[kind]()
    if kind == "closed":
        stream.close()
    monkeypatch.setattr(sys, name, stream)
    code = main(["methods"] if name == "stdout" else ["vary", "λ.png", "x", "-o", "a.png"])
    assert code == (2 if name == "stderr" or kind in ("full", "closed") else 0)
    if kind == "ascii":
        getattr(sys, name).close()
        assert "\\u" in (folder / "seen").read_text() or name == "stdout"


# --- folders ------------------------------------------------------------------------------------------------------

def test_a_folder_of_pictures(folder, capsys):
    """One bad picture is named, the rest goes on; what is there is kept, and made again only when asked."""
    for name in ("a.png", "b.jpg"):
        Image.open(CAT).convert("RGB").save(folder / name)
    (folder / "c.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture either")
    argv = ["vary", str(folder), "a lemon", "-o", ".", "-q", "--steps", "2", "--log", "log.json"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == ["a.png", "b.png"] and "c.png: not a picture" in err
    assert "1 of 3 references failed, named above" in err
    lines = [json.loads(line) for line in Path("log.json").read_text().splitlines()]
    assert [line["picture"] for line in lines] == ["a.png", "b.png"] and lines[0]["seed"] == 0
    (folder / "c.png").unlink()
    made = Path("a.png").read_bytes()
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "" and "a.png: is there" in err
    assert main([*argv, "--seed", "1", "--init", "shuffle"]) == 0
    assert "has another recipe and is left; --overwrite replaces it" in capsys.readouterr().err
    assert Path("a.png").read_bytes() == made
    assert main([*argv, "--seed", "1", "--init", "shuffle", "--overwrite"]) == 0
    assert Path("a.png").read_bytes() != made


# --- inspect ------------------------------------------------------------------------------------------------------

def test_inspect_reads_what_isadca_writes(own_weights, folder, capsys):
    (folder / "results").mkdir()
    (folder / "results" / "settings.json").write_text('{"steps": 50}')
    paths = [own_weights / "made.png", own_weights / "saved.safetensors", folder / "results"]
    assert main(["inspect", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert f"made.png: isadca vary {own_weights}/cat.png 'a lemon'" in out and "--steps=2" in out
    assert "saved.safetensors: a saved reference, 64×64, 2 steps, prompt ''" in out
    assert "results of isadca evaluate, 0 variations" in out and "steps: 50" in out


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, '"x"', "1"])
def test_inspect_of_a_damaged_results_folder(folder, capsys, text):
    (folder / "results").mkdir()
    (folder / "results" / "settings.json").write_text(text)
    refused(capsys, ["inspect", folder / "results"], "settings.json: is damaged")
