"""A folder of references into a folder of pictures: what is there is counted before the work, and nothing of the
user's is replaced."""

import json
import os
from pathlib import Path

import pytest
from conftest import DEMO, ROOT
from PIL import Image

import isadca
from isadca.app.recipe import read_recipe

EXAMPLES = ROOT / "examples"


@pytest.fixture
def photos(isadca_cli):
    """`in` with two references, and the command."""
    os.mkdir("in")
    for name in ("cat.png", "pig.png"):
        Path("in", name).write_bytes((EXAMPLES / name).read_bytes())
    return isadca_cli


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


# ---- nothing is replaced -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--n", 2, "--init", "random"]])
@pytest.mark.parametrize("out", ["in", "./in/../in", "link"])
def test_the_references_own_folder_is_no_output(photos, out, flags):
    os.symlink("in", "link")
    before = contents("in")
    code, written, err = photos("vary", "in", "a lemon", "-o", out, *flags)
    assert code == 2 and written == [] and "is the folder of the references; choose another -o" in err
    assert contents("in") == before


def test_a_reference_in_the_output_folder_is_not_replaced(photos):
    os.mkdir("out")
    os.link("in/cat.png", "out/cat.png")  # by another name
    before = contents("in")
    code, written, err = photos("vary", "in", "a lemon", "-o", "out", "--overwrite")
    assert code == 2 and written == [] and "out/cat.png: is the reference itself" in err and contents("in") == before


def test_a_picture_that_isadca_did_not_make_is_left(photos):
    os.mkdir("out")
    Image.new("RGB", (8, 8)).save("out/cat.png")
    mine = contents("out")["cat.png"]
    code, written, err = photos("vary", "in", "a lemon", "-o", "out", "--overwrite")
    assert (code, written) == (0, ["out/pig.png"]) and contents("out")["cat.png"] == mine
    assert "out/cat.png: was not made by isadca and is left; move it, or choose another -o" in err


@pytest.mark.parametrize("flags, says", [
    (["--log", "out/cat.png"], "out/cat.png: expected a name that ends in .jsonl or .json or .log or .txt"),
    (["--preview", "out/pig.png"], "--preview and -o or --grid are both out/pig.png"),
    (["--mask", "no.png"], "no.png: no such picture"), (["--also", "no.png"], "no.png: no such picture")])
def test_what_is_beside_the_pictures_is_looked_at_first(photos, flags, says):
    """Nothing is inverted, and no empty folder stays."""
    code, written, err = photos("vary", "in", "a lemon", "-o", "out", *flags)
    assert (code, written) == (2, []) and says in err and err.count("\n") == 1
    assert not os.path.exists("out") or flags[0] in ("--mask", "--also")


def test_the_log_may_lie_in_the_new_folder(photos):
    assert photos("vary", "in", "a lemon", "-o", "new/out", "--log", "new/out/log.jsonl")[0] == 0
    assert [json.loads(line)["picture"] for line in open("new/out/log.jsonl")] == ["new/out/cat.png", "new/out/pig.png"]


def test_a_file_is_no_folder(photos):
    Path("out").write_text("mine")
    code, _, err = photos("vary", "in", "a lemon", "-o", "out")
    assert code == 2 and "out: no folder can be made there (File exists); choose another -o" in err


# ---- what is there -------------------------------------------------------------------------------------------------

def test_only_what_is_missing_is_counted_and_made(photos):
    args = ["vary", "in", "a lemon", "-o", "out", "--init", "random", "--n"]
    assert len(photos(*args, 2)[1]) == 4
    os.unlink("out/cat-1.png")
    code, written, err = photos(*args, 3)
    assert (code, written) == (0, ["out/cat-1.png", "out/cat-2.png", "out/pig-2.png"])
    assert "3 pictures" in err and err.count("is there") == 3
    assert err.index("is there") < err.index("3 pictures")


def test_the_same_inputs_at_another_path_are_the_same(photos, tmp_path):
    assert photos("vary", "in", "a lemon", "-o", "out")[0] == 0
    code, written, err = photos("vary", os.path.abspath("in"), "a lemon", "-o", "out", "--weights", DEMO)
    assert (code, written) == (0, []) and err.count("is there") == 2


def test_what_is_no_reference_is_passed_over(photos):
    """Hidden files and weights; a damaged picture or reference is named, and the rest goes on."""
    Path("in/._cat.png").write_bytes(b"mac")
    Path("in/adapter.safetensors").write_bytes((DEMO / "ip-adapter_demo.safetensors").read_bytes())
    Path("in/zebra.safetensors").write_bytes(b"no")
    code, written, err = photos("vary", "in", "a lemon", "-o", "out")
    assert (code, written) == (2, ["out/cat.png", "out/pig.png"])
    assert "1 of 3 references failed" in err and "in/zebra.safetensors: not a whole safetensors file" in err


def test_a_pipe_in_the_folder_is_named_and_not_waited_for(photos):
    os.mkfifo("in/a.png")
    code, written, err = photos("vary", "in", "a lemon", "-o", "out")
    assert (code, written) == (2, ["out/cat.png", "out/pig.png"])
    assert "in/a.png: cannot be read (is a pipe or a device)" in err


def test_long_prompts_that_begin_alike_have_names_of_their_own(photos):
    begins = "a lemon on a table in a very large and very bright room with many windows, and"
    Path("p.TXT").write_text(f"{begins} a cat\n{begins} a dog\n")
    code, written, err = photos("vary", "in/cat.png", "p.TXT", "-o", "out")
    assert code == 0 and len(set(written)) == 2, err


# ---- recipes of pictures that were moved ---------------------------------------------------------------------------

def test_a_picture_is_not_its_own_reference(photos):
    """The reference had the same name; it is gone."""
    assert photos("vary", "in", "a lemon", "-o", "out")[0] == 0
    os.unlink("in/cat.png")
    code, _, err = photos("vary", "--recipe", "out/cat.png", "-o", "again.png", steps=0)
    assert code == 2 and "in/cat.png: no such picture" in err


def test_one_word_beside_a_recipe_is_a_reference(photos):
    assert photos("vary", "in/cat.png", "a lemon", "-o", "a.png")[0] == 0
    code, _, err = photos("vary", "--recipe", "a.png", "a pig", "-o", "b.png", steps=0)
    assert code == 2 and "a pig: no such picture; for another prompt give REF and PROMPT" in err


def test_a_recipe_from_python_is_said_to_be(photos):
    model = isadca.load(DEMO, device="cpu")
    [picture] = isadca.vary(model, "in/cat.png", "a lemon", steps=2)
    isadca.save_png(picture, "py.png")
    code, _, err = photos("vary", "--recipe", "py.png", "-o", "b.png", steps=0)
    assert code == 2 and "py.png: was made from Python, expected isadca vary" in err
    assert "steps=2" in read_recipe("py.png")["run"]


@pytest.mark.parametrize("key", ["ref", "mask", "weights"])
def test_half_a_character_in_a_recipes_path(photos, key):
    assert photos("vary", "in/cat.png", "a lemon", "-o", "a.png")[0] == 0
    recipe = read_recipe("a.png")
    recipe["args"][key] = "\ud800.png"
    isadca.save_png(Image.open("a.png"), "forged.png", recipe)
    code, _, err = photos("vary", "--recipe", "forged.png", "-o", "b.png", steps=0)
    assert code == 2 and err.count("\n") == 1 and "which can be no path" in err


# ---- inspect -------------------------------------------------------------------------------------------------------

def test_inspect_of_a_folder_of_pictures(photos):
    assert photos("vary", "in", "a lemon", "-o", "out")[0] == 0
    code, lines, _ = photos("inspect", "out", steps=0)
    assert code == 0 and [line.split(":")[0] for line in lines if line[0] != " "] == ["out/cat.png", "out/pig.png"]


@pytest.mark.parametrize("name, says", [
    ("photo.jpg", "holds no isadca recipe; only PNGs written by isadca do"),
    ("notes.txt", "is nothing that isadca writes or reads"), ("page.html", "is nothing that isadca writes or reads")])
def test_inspect_of_other_files(photos, name, says):
    Image.new("RGB", (8, 8)).save("photo.jpg")
    Path(name).touch()
    code, _, err = photos("inspect", name, steps=0)
    assert code == 2 and f"{name}: {says}" in err
