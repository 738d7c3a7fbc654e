"""Everything that people get wrong, through the command line: each case is one line on standard error that names the
thing and the remedy, exit code 2, and nothing written."""

import io
import json
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
from conftest import DEMO, ROOT
from keyfiles import listing, write_sparse
from PIL import Image
from safetensors.torch import load_file, save_file

from isadca import commands
from isadca.cli import main
from isadca.images import load_image, save_png

CAT = str(ROOT / "examples" / "cat.png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`in` for what the user has; the current folder, empty, is where output would go."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    return tmp_path / "in"


def refused(capsys, argv: list, *words: str) -> str:
    """What every case comes to. A remedy follows a semicolon, or is what was `expected`."""
    before = sorted(os.listdir())
    code = main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("isadca: ") and "Traceback" not in err
    assert [word for word in words if word not in err] == [], err
    assert "; " in err or "expected" in err, f"no remedy: {err}"
    assert sorted(os.listdir()) == before, "nothing is left behind"
    return err


def vary(*flags, ref=CAT, prompt="a lemon") -> list:
    return ["vary", ref, prompt, "-o", "a.png", "-q", "--steps", "2", *flags]


# --- weights --------------------------------------------------------------------------------------------------------

def raw(header, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape=(2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


DAMAGED, PLEASE = "is not a whole safetensors file", "; download it again"
BYTES = {  # the errors of the safetensors library, by name, and what is no safetensors file at all
    "HeaderTooSmall": (b"\3\0\0", DAMAGED), "HeaderTooLarge": (raw(b"{}", length=10**9), DAMAGED),
    "InvalidHeaderLength": (raw(b"{}", length=999), DAMAGED), "InvalidHeader, not UTF-8": (raw(b'{"\xff":0}'), DAMAGED),
    "InvalidHeaderStart": (raw(b"[1, 2]"), DAMAGED), "InvalidHeaderDeserialization": (raw(b'{"a": '), DAMAGED),
    "InvalidHeaderDeserialization, dtype": (raw({"a": entry(0, 8, dtype="F42")}, bytes(8)), DAMAGED),
    "TensorInvalidInfo": (raw({"a": entry(0, 8, (3,))}, bytes(8)), DAMAGED),
    "InvalidOffset, a hole": (raw({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)), DAMAGED),
    "InvalidOffset, an overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), DAMAGED),
    "InvalidOffset, backwards": (raw({"a": entry(8, 0)}, bytes(8)), DAMAGED),
    "MetadataIncompleteBuffer, short": (raw({"a": entry(0, 8)}, bytes(7)), DAMAGED),
    "MetadataIncompleteBuffer, long": (raw({"a": entry(0, 8)}, bytes(9)), DAMAGED),
    "ValidationOverflow": (raw({"a": entry(0, 8, (2**40, 2**40))}, bytes(8)), DAMAGED),
    "MisalignedSlice": (raw({"a": entry(0, 1, (1,), "F4")}, bytes(1)), DAMAGED),
    "a header of brackets": (raw(b'{"a":' + b"[" * 100_000), DAMAGED),
    "zero bytes": (b"", "is empty"), "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>", DAMAGED),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_are_no_weights(folder, capsys, case):
    path = folder / "model.safetensors"
    path.write_bytes(BYTES[case][0])
    refused(capsys, vary("--weights", path), str(path), BYTES[case][1], "; ")


def changed(part: str, **tensors):
    """A maker of the demo's folder with some tensors of one part replaced by what a function makes of them."""
    def make(folder: Path) -> Path:
        (folder / "model").mkdir()
        for item in DEMO.iterdir():
            if item.name != part:
                (folder / "model" / item.name).symlink_to(item)
        source = next((DEMO / part).glob("*.safetensors")) if (DEMO / part).is_dir() else DEMO / part
        state = load_file(source)
        target = folder / "model" / source.relative_to(DEMO)
        target.parent.mkdir(exist_ok=True)
        if (source.parent / "config.json").exists():
            (target.parent / "config.json").symlink_to(source.parent / "config.json")
        for key, change in tensors.items():
            key = next(k for k in state if k.endswith(key.replace("__", ".")))
            state[key] = change(state[key]).contiguous()
        save_file(state, target)
        return folder / "model"
    return make


def sparse(tensors: dict):
    return lambda folder: write_sparse(folder / "model.safetensors", tensors)


def pickled(folder: Path) -> Path:
    torch.save({"conv_in.weight": torch.zeros(4)}, folder / "model.ckpt")
    return folder / "model.ckpt"


def fp8(tensor):
    return tensor.to(torch.float8_e4m3fn)


UNET, LDM = listing("sd15_diffusers_unet"), listing("sd15_single_file_ldm_emaonly")
ADAPTER = listing("ip-adapter_sd15")
INPUT = "model.diffusion_model.input_blocks.0.0.weight"
WEIGHTS = {  # what it is: (flag, maker of the file, what the line says)
    "no such file": ("--weights", lambda f: f / "nothing", "no such file or folder", "; --weights takes"),
    "an empty folder": ("--weights", lambda f: f, "has no unet folder", "; --weights takes"),
    "a folder for a file": ("--ip-adapter", lambda f: f, "no .safetensors file"),
    "a folder of another part": ("--vae", lambda f: DEMO / "unet", "holds unet, expected vae"),
    "SD 2": ("--weights", sparse({k: v for k, v in LDM.items() if "cond_stage" not in k} | {
        "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": ("F32", (8,))}), "an SD 2.x model", "1.x"),
    "SDXL": ("--weights", sparse(UNET | {"add_embedding.linear_1.weight": ("F16", (8, 8))}), "an SDXL model", "1.x"),
    "inpainting": ("--weights", sparse(LDM | {INPUT: ("F32", (320, 9, 3, 3))}), "an inpainting or editing model"),
    "a LoRA": ("--weights", sparse({"lora_unet_mid.alpha": ("F16", ())}), "a LoRA", "; merge it"),
    "a ControlNet": ("--weights", sparse({"control_model.input_hint_block.0.weight": ("F16", (8,))}), "a ControlNet"),
    "a pickle": ("--weights", pickled, "is a pickle", "; get the .safetensors version"),
    "fp8": ("--weights", changed("unet", conv_in__weight=fp8), "conv_in.weight is F8_E4M3", "fp16"),
    "int8": ("--vae", lambda f: changed("vae", encoder__conv_in__weight=torch.Tensor.char)(f) / "vae", "is I8", "fp16"),
    "NaN in the UNet": ("--weights", changed("unet", conv_out__bias=lambda t: t.fill_(torch.nan)), "inverting",
                        "t = 1 on", "NaN", "conv_out.bias", "download it again"),
    "NaN in the VAE's encoder": ("--weights", changed("vae", encoder__conv_in__bias=lambda t: t.fill_(torch.nan)),
                                 "encoding", "encoder.conv_in.bias", "download it again"),
    "inf in the VAE's decoder": ("--weights", changed("vae", decoder__conv_out__bias=lambda t: t.fill_(torch.inf)),
                                 "decoding", "decoder.conv_out.bias", "download it again"),
    "NaN in the text encoder": ("--weights", changed("text_encoder", final_layer_norm__bias=lambda t: t * torch.nan),
                                "inverting", "final_layer_norm.bias", "download it again"),
    "NaN in the adapter": ("--weights", changed("ip-adapter_demo.safetensors", to_v_ip__weight=lambda t: t * torch.nan),
                           "sampling", "t = 501 on", "to_v_ip.weight", "download it again"),
    "another UNet's adapter": ("--ip-adapter", sparse(ADAPTER), "made for another UNet", "; SD 1.5 takes"),
    "an adapter of another encoder": ("--weights", changed(
        "ip-adapter_demo.safetensors", image_proj__proj__weight=lambda t: torch.zeros(len(t), 1024)),
        "reads 1024-wide image features", "; it needs ViT-H, h94's models/image_encoder (--image-encoder)"),
    "a picture": ("--weights", lambda f: Path(CAT), DAMAGED, "; download it again"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit(folder, capsys, case):
    flag, make, *words = WEIGHTS[case]
    path = make(folder)
    refused(capsys, vary(flag, path), str(path), *words)


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
    "--n 0": "--n is 0, expected 1 or more", "--guidance nan": "guidance is nan, expected a finite number",
    "--guidance inf": "guidance is inf, expected a finite number", "--ip-scale nan": "ip_scale is nan, expected",
    "--guidance 1e38": "sampling: inf or NaN from step t = 1 on, in float32; try a smaller --guidance",
    "--diversity 2": "diversity is 2.0, expected 0 to 1", "--seed -1": "--seed is -1, expected 0 to 2^62",
    "--rows-at-once 0": "--rows-at-once is 0, expected", "--replay-at-once 0": "--replay-at-once is 0, expected",
    "--layers 99": "layers is (99,), expected 0 to", "--layers x": "--layers: 'x', expected such as 10-15",
    "--size 63": "size is 63, expected a multiple of", "--size 0": "size is 0, expected a multiple of",
    "--size 100000": "size is 100000, expected a multiple of 16 up to 4096",
    "--device abacus": "device 'abacus' is not available here; try --device cpu",
    "--device meta": "device 'meta' is not available here; try --device cpu",
    "--dtype fp8": "dtype is 'fp8', expected auto, fp32", "--method magic": "method is 'magic', expected one of",
    "--fit stretch": "--fit: invalid choice: 'stretch'", "--nonsense": "unrecognized arguments: --nonsense; see",
    "--attend nothing.py:f": "--attend is 'nothing.py:f', expected FILE.py:NAME",
    "--recipe nothing.png": "nothing.png: no such picture; check the path",
    "-o no/a.png": "the folder no does not exist; make it first",
    "-o a.jpg": "a.jpg: expected a name that ends in .png", "-o .": "expected a name that ends in .png",
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
    "attend": ("code.py:f", "was made with --attend code.py:f; give the flag again to run that code"),
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
    monkeypatch.setattr(commands, "sample", out_of_memory)
    refused(capsys, vary(), "out of memory; try --rows-at-once 4, --replay-at-once 1, --dtype fp16 or a smaller --size")


def test_a_gpu_fault_is_not_taken_for_a_lack_of_memory(folder, monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(commands, "sample", fault)
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
    "wide.png --fit squash": (encoded(WIDE, "PNG"), "is 96×64; it is distorted to a square"),
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
