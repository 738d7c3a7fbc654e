"""Everything that people get wrong, through the command line: each case is one line on standard error that names the
thing and the remedy, exit code 2, and nothing written."""

import io
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import CAT, entry, raw, refused, vary
from PIL import Image

from isadca.app import commands, session
from isadca.app.cli import main
from isadca.common.files import save_png
from isadca.common.images import load_image

# --- pictures -------------------------------------------------------------------------------------------------------

def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
PICTURES = {
    "cut.jpg": (encoded(NOISE, "JPEG")[:-300], "is damaged", "; save it anew"),
    "cut.png": (encoded(NOISE, "PNG")[:-300], "is damaged", "; save it anew"),
    "bomb.png": (png_header(100_000, 100_000), "more than", "; scale it down first"),
    "0x0.png": (png_header(0, 0), "not a picture", "; convert it to one of PNG"),
    "1x10000.png": (encoded(Image.new("RGB", (1, 10_000)), "PNG"), "1×10000", "; crop it"),
    "10000x1.png": (encoded(Image.new("RGB", (10_000, 1)), "PNG"), "10000×1", "; crop it"),
    "phone.heic": (HEIC, "not a picture", "; convert it to one of PNG, JPEG"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture", "; convert it to one of PNG, JPEG"),
    "notes.png": (b"a text file\n", "not a picture", "; convert it to one of PNG"),
    "empty.png": (b"", "not a picture", "; convert it to one of PNG"),
    "weights.png": (raw({"a": entry(0, 8)}, bytes(8)), "not a picture", "; convert it to one of PNG"),
    "cat.safetensors": (raw({"a": entry(0, 8)}, bytes(8)), "not a reference", "; make one with: isadca invert"),
    "cut.safetensors": (raw({"a": entry(0, 8)}, bytes(7)), "not a whole safetensors file", "; invert the picture"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_cannot_be_read(folder, capsys, name):
    data, *words = PICTURES[name]
    (folder / name).write_bytes(data)
    refused(capsys, vary(ref=folder / name), str(folder / name), *words)


# --- flags and paths ------------------------------------------------------------------------------------------------

FLAGS = {
    "--lam 1.5": "lam is 1.5, expected 0 to 1", "--lam -0.1": "lam is -0.1, expected 0 to 1",
    "--lam nan": "lam is nan, expected 0 to 1", "--lam high": "lam is 'high', expected a number",
    "--lam linear:1": "expected a number such as 0.7, or linear:1:0.3", "--lam linear:1:2": "expected 0 to 1",
    "--steps 0": "steps is 0, expected 1 to 999", "--steps 1001": "steps is 1001, expected 1 to 999",
    "--steps -5": "steps is -5, expected 1 to 999", "--steps many": "--steps: invalid int value: 'many'; see",
    "--k 1000": "k is 1000, expected 0 to 999", "--k -1": "k is -1, expected 0 to 999",
    "--k 500 --t-start 500": "t_start is 500, expected more than k, which is 500",
    "--n 0": "--n: '0', expected 1 to 10000", "--guidance nan": "guidance is nan, expected a finite number",
    "--guidance inf": "guidance is inf, expected a finite number", "--ip-scale nan": "ip_scale is nan, expected",
    "--guidance 1e38": "sampling: inf or NaN from step t = 1 on, in float32; try a smaller --guidance",
    "--diversity 2": "diversity is 2.0, expected 0 to 1", "--seed -1": "--seed: '-1', expected 0 to",
    "--rows-at-once 0": "--rows-at-once: '0', expected", "--replay-at-once 0": "--replay-at-once: '0', expected",
    "--fixed-point 101": "--fixed-point: '101', expected 0 to 100",
    "--layers 99": "layers is (99,), expected some of 0 to", "--layers x": "--layers: 'x', expected such as 10-15",
    "--size 63": "size is 63×63, expected multiples of", "--size 0": "size is 0×0, expected multiples of",
    "--size 100000": "size is 100000×100000, expected multiples of 16 to 4096; try 64",
    "--size 64x60": "size is 64×60, expected multiples of 16", "--size 64×64": "--size: '64×64', expected such as 512",
    "--size -64": "--size: '-64', expected such as 512", "--size 64x": "--size: '64x', expected such as 512 or 512x768",
    "--width 60": "size is 60×64, expected multiples of 16", "--height 0": "--height: '0', expected 1 to",
    "--width wide": "--width: 'wide', expected 1 to", "--size 96 --height 24": "size is 96×24, expected",
    "--device abacus": "device 'abacus' is not available here; try --device cpu",
    "--device meta": "device 'meta' is not available here; try --device cpu",
    "--dtype fp8": "dtype is 'fp8', expected auto, fp32", "--method magic": "method is 'magic', expected one of",
    "--fit stretch": "--fit: invalid choice: 'stretch'", "--nonsense": "unrecognized arguments: --nonsense; see",
    "--attend nothing.py:f": "unrecognized arguments: --attend nothing.py:f; did you mean --method?",
    "--method nothing.py:f": "--method is 'nothing.py:f', expected FILE.py:NAME",
    "--recipe nothing.png": "nothing.png: no such picture; check the path",
    "-o no/a.png": "the folder no does not exist; make it first",
    "-o a.jpg": "a.jpg: expected a name that ends in .png",
    "--grid no/sheet.png": "the folder no does not exist; make it first",
    "--grid a.png": "--grid and -o are both a.png; choose",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_make_no_sense(folder, capsys, flags):
    refused(capsys, vary(*flags.split()), FLAGS[flags])


def test_the_reference_is_not_overwritten(folder, capsys):
    Image.open(CAT).save("a.png")
    refused(capsys, vary(ref="./a.png"), "a.png: is the reference itself; choose another -o")
    assert load_image("a.png") == load_image(CAT)


RECIPES = {  # what a forged or old recipe says: what the line says
    "method": ("code.py:f", "was made with --method code.py:f; give the flag again to run that code"),
    "nonsense": (1, "damaged or of another version: unrecognized arguments: --nonsense=1; see"),
    "steps": ([1, 2], "damaged or of another version: argument --steps: invalid int value: '1,2'; see"),
    "prompt": (7, "its recipe is damaged; give REF, PROMPT and the flags yourself"),
    "init": ("thrice", "--init: invalid choice: 'thrice'"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_make_no_sense(folder, capsys, name):
    value, says = RECIPES[name]
    args = {"ref": CAT, "prompt": "a lemon", "grid": "stolen.png", "command": "inspect", name: value}
    save_png(Image.open(CAT), folder / "x.png", {"command": "vary", "args": args, "weights_sha256": {}})
    refused(capsys, ["vary", "--recipe", folder / "x.png", "-o", "a.png"], str(folder / "x.png"), says)


def test_a_recipe_writes_only_what_it_is_asked_to(folder, capsys, monkeypatch):
    args = {"ref": CAT, "prompt": "a lemon", "grid": "stolen.png", "command": "inspect", "out": "stolen.png"}
    save_png(Image.open(CAT), folder / "x.png", {"command": "vary", "args": args, "weights_sha256": {}})
    given = []
    monkeypatch.setattr(commands, "vary", given.append)
    assert main(["vary", "--recipe", str(folder / "x.png"), "-o", "a.png"]) == 0
    assert (given[0].command, str(given[0].out), given[0].grid) == ("vary", "a.png", None)


def test_terminal_codes_do_not_reach_the_terminal(folder, capsys):
    assert "\x1b" not in refused(capsys, vary("--weights", "no\x1b[31m\x07"), "no?[31m?: no such file")


def fails(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))
    return fail


@pytest.mark.parametrize("broken, number, says", [
    ((tempfile, "mkstemp"), 30, "a.png: cannot write there (Read-only file system); choose another -o"),
    ((Image.Image, "save"), 28, "a.png: cannot write there (No space left on device); choose another -o"),
    ((os, "replace"), 13, "a.png: cannot write there (Permission denied); choose another -o")])
def test_a_disk_that_does_not_take_it(folder, capsys, monkeypatch, broken, number, says):
    monkeypatch.setattr(*broken, fails(number))
    refused(capsys, vary(), says)


def test_a_read_only_folder_is_noticed_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(commands, "Session", None)
    refused(capsys, vary(), "a.png: the folder . is not writable; choose another -o")


def test_out_of_memory_names_the_flags_that_help(folder, capsys, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB free.")
    monkeypatch.setattr(session, "sample", out_of_memory)
    refused(capsys, vary(), "out of memory; try --rows-at-once 4, --replay-at-once 1, --dtype fp16 or a smaller --size")


def test_a_gpu_fault_is_not_taken_for_a_lack_of_memory(folder, monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(session, "sample", fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main(vary())


def test_standard_output_that_is_full_or_closed(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert main(["methods"]) == 2
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert main(["methods"]) == 0
    assert capsys.readouterr().err == ("isadca: standard output: No space left on device; mend that and run it again\n")


@pytest.mark.parametrize("loop", ["inverting", "sampling"])
def test_ctrl_c_while_it_works(folder, loop):
    """A real signal, to a process of its own. (Where the tests run in the background, SIGINT is ignored by
    inheritance: the process is started without that.)"""
    argv = ["vary", CAT, "a lemon", "-o", "a.png", "--steps", "40", "--n", "200", "--init", "shuffle"]
    work = subprocess.Popen([sys.executable, "-m", "isadca", *argv], stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    seen = b""
    while loop.encode() not in seen:
        seen += work.stderr.read1() or pytest.fail(seen.decode())
    work.send_signal(signal.SIGINT)
    rest = work.communicate(timeout=60)[1].decode()
    assert work.returncode == 130 and rest.endswith("isadca: interrupted\n") and "Traceback" not in rest
    assert os.listdir() == []


# --- prompts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", ["", " ", "\0", "a\0b", "レモン", "ليمون 🍋", "\x1b[31m\u202e", "<|endoftext|>"])
def test_any_text_is_a_prompt(folder, capsys, prompt):
    assert main(vary(prompt=prompt)) == 0
    assert capsys.readouterr().out == "a.png\n"


def test_half_a_character_is_not_a_prompt(folder, capsys):
    refused(capsys, vary(prompt="caf\udce9"), "is not Unicode text; type it again in UTF-8")


def test_a_long_prompt_is_cut_and_the_note_says_where(folder, capsys):
    assert main(vary(prompt="a lemon " * 5000 + "at night")) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "longer than 32 tokens; not used: 'a lemon" in err and "at night'" in err
    assert len(err) < 200


# --- what is accepted, and said -------------------------------------------------------------------------------------

def grey_with_alpha() -> Image.Image:
    image = NOISE.convert("LA")
    image.putpixel((0, 0), (100, 0))
    return image


PALETTE = NOISE.quantize(16)
WIDE = NOISE.resize((96, 64))
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
ACCEPTED = {  # the file, and what the note says of it
    "rgba.png": (encoded(grey_with_alpha().convert("RGBA"), "PNG"), "what is transparent becomes white"),
    "opaque.png": (encoded(NOISE.convert("RGBA"), "PNG"), None),
    "la.png": (encoded(grey_with_alpha(), "PNG"), "what is transparent becomes white"),
    "palette.png": (encoded(PALETTE, "PNG", transparency=3), "what is transparent becomes white"),
    "cmyk.jpg": (encoded(NOISE.convert("CMYK"), "JPEG"), None),
    "16bit.png": (encoded(Image.fromarray(np.full((64, 64), 30_000, dtype=np.uint16)), "PNG"), None),
    "moves.gif": (encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)]),
                  "holds 2 pictures; the first is used"),
    "really_a.jpg": (encoded(NOISE, "PNG"), None),
    "sideways.jpg": (encoded(WIDE, "JPEG", exif=SIDEWAYS), "is 64×96; its centre is used (or: --fit squash,"),
    "wide.png": (encoded(WIDE, "PNG"), "is 96×64; its centre is used"),
    "wide.png --fit squash": (encoded(WIDE, "PNG"), "is 96×64; it is distorted"),
    "wide.png --fit pad": (encoded(WIDE, "PNG"), "is 96×64; it gets white borders"),
    "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), None),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_done_to_a_picture_is_said(folder, capsys, case):
    name, *flags = case.split()
    data, said = ACCEPTED[case]
    (folder / name).write_bytes(data)
    assert main(vary(*flags, ref=str(folder / name))) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if said else 0)
    assert not said or err.startswith(f"isadca: note: {folder / name}") and said in err


def test_the_recipe_carries_the_fit(folder, capsys):
    (folder / "wide.png").write_bytes(encoded(WIDE, "PNG"))
    for how in ("crop", "pad", "squash"):
        assert main(vary("--fit", how, "-o", f"{how}.png", ref=str(folder / "wide.png"))) == 0
        assert main(["vary", "--recipe", f"{how}.png", "-o", "again.png", "-q"]) == 0
        assert Path("again.png").read_bytes() == Path(f"{how}.png").read_bytes()
    assert len({Path(f"{how}.png").read_bytes() for how in ("crop", "pad", "squash")}) == 3


def test_a_saved_reference_has_its_fit_and_prompt(folder, capsys):
    assert main(["invert", CAT, "-o", "cat.safetensors", "--steps", "2", "-q", "--ref-prompt", "a cat"]) == 0
    capsys.readouterr()
    refused(capsys, vary("--fit", "pad", ref="cat.safetensors"), "--fit is pad, but cat.safetensors was", "leave the")
    refused(capsys, vary("--ref-prompt", "a dog", ref="cat.safetensors"), "--ref-prompt is a dog, but", "with a cat")
