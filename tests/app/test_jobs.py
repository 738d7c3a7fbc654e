"""Whole jobs: many prompts from a file, and what is said before and during the work."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from isadca.app import session
from isadca.app.recipe import read_recipe

CAT = str(ROOT / "examples" / "cat.png")


def pixels(path):
    return np.array(Image.open(path)).astype(int)


# ---- prompts of a file -------------------------------------------------------------------------------------------

def test_prompts_of_a_file(isadca_cli, monkeypatch):
    """One a line, in UTF-8; each reference is inverted once; what is there is left, a new line is made."""
    inverted, invert = [], session.invert
    monkeypatch.setattr(session, "invert", lambda *args, **named: inverted.append(1) or invert(*args, **named))
    os.mkdir("in")
    for name in ("cat.png", "dog.png"):
        Image.open(CAT).save(f"in/{name}")
    with open("prompts.txt", "w", encoding="utf-8") as file:
        file.write("\ufeff# what we want\n\na lemon\n  ein Löwe, 🦁  \n")
    argv = ["vary", "in", "prompts.txt", "-o", "out", "-q", "--log", "log.jsonl"]
    code, out, err = isadca_cli(*argv)
    assert (code, err, len(inverted)) == (0, "", 2)
    assert out == [f"out/{name}.png" for name in ("cat-a-lemon", "cat-ein-löwe", "dog-a-lemon", "dog-ein-löwe")]
    assert read_recipe("out/cat-ein-löwe.png")["args"]["prompt"] == "ein Löwe, 🦁"
    assert [json.loads(line)["prompt"] for line in open("log.jsonl")] == ["a lemon", "ein Löwe, 🦁"] * 2
    assert isadca_cli("vary", CAT, "a lemon", "-o", "alone.png")[0] == 0
    assert (pixels("alone.png") == pixels("out/cat-a-lemon.png")).all()
    with open("prompts.txt", "a", encoding="utf-8") as file:
        file.write("a pig")
    code, out, err = isadca_cli(*argv)
    assert code == 0 and out == ["out/cat-a-pig.png", "out/dog-a-pig.png"]
    assert err.count("is there") == err.count("\n") == 4
    code, out, err = isadca_cli(*argv, "--lam", "0")
    assert (code, out) == (0, []) and err.count("has another recipe and is left; --overwrite replaces it") == 6


def test_a_recipes_prompt_is_never_a_file(isadca_cli):
    """A forged picture would otherwise choose what is read, and a prompt that ends in .txt could not be made again."""
    os.mkdir("out")
    open("prompts.txt", "w").write("notes.txt\n")
    open("notes.txt", "w").write("a secret\n")
    assert isadca_cli("vary", CAT, "prompts.txt", "-o", "out")[:2] == (0, ["out/cat-notes-txt.png"])
    code, out, err = isadca_cli("vary", "--recipe", "out/cat-notes-txt.png", "-o", "again.png", steps=0)
    assert (code, out) == (0, ["again.png"])
    assert open("again.png", "rb").read() == open("out/cat-notes-txt.png", "rb").read()
    code, out, err = isadca_cli("vary", CAT, "notes.txt", "--recipe", "again.png", "-o", "out", steps=0)
    assert out == ["out/cat-a-secret.png"]  # typed, it is a file


def test_a_second_reference_is_inverted_once(isadca_cli, monkeypatch):
    inverted, invert = [], session.invert
    monkeypatch.setattr(session, "invert", lambda *args, **named: inverted.append(1) or invert(*args, **named))
    open("prompts.txt", "w").write("a lemon\na pig\n")
    assert isadca_cli("vary", CAT, "prompts.txt", "-o", "out", "--also", CAT, "--init", "shuffle")[0] == 0
    assert len(inverted) == 2


@pytest.mark.parametrize("text, flags, says", [
    (b"# nothing\n\n", [], "prompts.txt: no prompts in it, expected one a line"),
    (b"caf\xe9\n", [], "prompts.txt: is no text in UTF-8; save the prompts as that"),
    (None, [], "prompts.txt: no file of prompts (No such file or directory); check the path"),
    (b"a lemon\nA Lemon!\n", [], "two pictures would be called cat-a-lemon.png; rename a reference, or reword"),
    (b"a lemon\n", ["-o", "a.png"], "a.png: is one file, but REF is"),
    (b"a lemon\n", ["--grid", "g.png"], "--grid is of one reference"),
    (b"a lemon\n", ["--log", "prompts.txt"], "prompts.txt: is what PROMPT names; choose another --log")])
def test_prompts_that_cannot_be_read(isadca_cli, text, flags, says):
    if text is not None:
        open("prompts.txt", "wb").write(text)
    before = os.listdir()
    code, out, err = isadca_cli("vary", CAT, "prompts.txt", "-o", "out", *flags)
    assert code == 2 and out == [] and says in err and err.count("\n") == 1
    assert os.listdir() == before


# ---- what is said before and during the work -----------------------------------------------------------------------

def test_the_start_line_says_what_is_to_come(isadca_cli):
    code, out, err = isadca_cli("vary", CAT, "a zebra riding a bicycle", "-o", "a.png", "--n", 2, "--init", "shuffle")
    first, *rest = err.splitlines()
    assert first.startswith("isadca: the demo (64×64 emoji; for photos: isadca fetch) on cpu in float32: 64×64, 3 "
                            "steps, 2 pictures, about 0.") and first.endswith(" GB")
    assert "isadca: note: the demo does not know zebra, riding; what it knows: weights/demo/README.md" in err
    code, out, err = isadca_cli("sweep", CAT, "a lemon", "a pig", "-o", "g.png", "--lam", "0,1", "--size", 256,
                                steps=1)
    assert "256×256, 1 step, 4 pictures" in err and "on a CPU this is for checking" in err.splitlines()[0]
    os.mkdir("in")
    for name in ("cat.png", "dog.png"):
        Image.open(CAT).save(f"in/{name}")
    for pictures in (2, None):  # the second time all are there
        code, out, err = isadca_cli("vary", "in", "a lemon", "-o", "out")
        assert ("2 pictures" in err) == (pictures == 2) and ("steps" in err) == (pictures == 2)


def test_the_bar_is_of_the_whole_job(isadca_cli):
    """Inverting one of two references is not half of it: each then has a step of guided rows, and the other follows."""
    os.mkdir("in")
    for name in ("cat.png", "dog.png"):
        Image.open(CAT).save(f"in/{name}")
    code, out, err = isadca_cli("vary", "in", "a lemon", "-o", "out")
    shown = [int(percent) for percent in re.findall(r"(\d+)%", err)]
    assert shown[0] == 0 and shown == sorted(shown) and shown.count(100) >= 1
    assert err.endswith(" left\n") and "inverting" in err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads what Linux says of a process")
def test_the_memory_of_the_start_line_is_what_a_run_takes(isadca_cli, tmp_path):
    # the peak of this program alone: getrusage's would be that of the process which started it, if that was larger
    code = ("import re; from isadca.app.cli import main\n"
            f"main(['vary', {CAT!r}, 'a lemon', '-o', 'b.png', '--steps', '5', '--size', '256'])\n"
            "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024 / 1e9)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    said = float(re.search(r"about ([\d.]+) GB", done.stderr)[1])
    assert 0.7 < said / float(done.stdout.split()[-1]) < 1.4
