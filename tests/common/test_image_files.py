"""Picture files: every kind that is read, every kind of damage, whole-or-not-at-all writing, and the recipe."""

import io
import os
import stat
import struct
import tempfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from isadca.app.recipe import read_recipe
from isadca.common.files import atomic_write, save_png
from isadca.common.images import RECIPE_KEY, load_image
from isadca.common.problem import Problem

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)  # 9 wide, 6 high
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def loaded(path, data: bytes) -> np.ndarray:
    path.write_bytes(data)
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def one_line(problem) -> str:
    assert "\n" not in str(problem.value)
    return str(problem.value)


# --- load_image: what is read

UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
           7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(tmp_path, orientation, format):
    """All 8 ways a camera is held. JPEG loses detail, so it gets flat quarters of the picture."""
    pixels = PIXELS if format != "JPEG" else np.kron(PIXELS[:2, :3], np.ones((16, 16, 1), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    got = loaded(tmp_path / "x", encoded(Image.fromarray(pixels), format, exif=exif, **options))
    expected = UPRIGHT[orientation](pixels).astype(int)
    assert got.shape == expected.shape and abs(got - expected).max() <= (3 if format == "JPEG" else 0)


@pytest.mark.parametrize("format, name", [("PNG", "x.png"), ("PNG", "x.jpg"), ("BMP", "x.png"), ("TIFF", "x"),
                                          ("PNG", "猫 é.png")])
def test_content_decides_not_the_name(tmp_path, format, name):
    assert np.array_equal(loaded(tmp_path / name, encoded(PICTURE, format)), PIXELS)


def with_alpha(mode: str) -> tuple[Image.Image, dict]:
    """A row of 3 pixels in grey 100: transparent, half (where the mode can), opaque. And how to save it."""
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (3, 1), (100, 100, 100, 0))
        image.putpixel((1, 0), (100, 100, 100, 128))
        image.putpixel((2, 0), (100, 100, 100, 255))
        return image.convert(mode), {}
    if mode.startswith("P"):
        image = Image.new("P", (3, 1))
        image.putpalette([100, 100, 100] * 3)
        image.putdata([0, 1, 2])
        return image, {"transparency": bytes([0, 128, 255]) if mode == "P alpha" else 0}
    image = Image.new(mode, (3, 1), 100 if mode == "L" else (100, 100, 100))
    image.putpixel((0, 0), 7 if mode == "L" else (7, 7, 7))  # the one colour that counts as transparent
    return image, {"transparency": 7 if mode == "L" else (7, 7, 7)}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P alpha", "P", "L", "RGB"])
def test_transparency_is_white(tmp_path, mode):
    image, options = with_alpha(mode)
    got = loaded(tmp_path / "x.png", encoded(image, "PNG", **options))
    half = 100 if mode in ("P", "L", "RGB") else (100 * 128 + 255 * 127) / 255
    assert abs(got[0] - np.array([[255], [half], [100]])).max() <= 1


def test_grey_one_bit_and_cmyk(tmp_path):
    grey = Image.fromarray(PIXELS[..., 0])
    assert np.array_equal(loaded(tmp_path / "l", encoded(grey, "PNG")), np.repeat(PIXELS[..., :1], 3, axis=2))
    bits = Image.fromarray(PIXELS[..., 0] > 127)
    assert bits.mode == "1"
    assert np.array_equal(loaded(tmp_path / "1", encoded(bits, "PNG"))[..., 1], 255 * (PIXELS[..., 0] > 127))
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.array_equal(loaded(tmp_path / "cmyk", encoded(ink, "TIFF"))[0, 0], (255, 0, 0))
    assert abs(loaded(tmp_path / "jpeg", encoded(ink, "JPEG", quality=100))[0, 0] - (255, 0, 0)).max() <= 3


def test_16_bit_grey_keeps_the_high_byte(tmp_path):
    """PIL alone would clip everything above 255 to white."""
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        got = loaded(tmp_path / "x", encoded(Image.fromarray(values), format))
        assert got[0].tolist() == [[v, v, v] for v in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("values, expected, says", [
    (np.array([[0, 4095]], dtype=np.uint16), [0, 15], "end at 4095, so it is nearly black"),  # 12 bits in 16
    (np.array([[0, 0.5, 1]], dtype=np.float32), [0, 128, 255], "0 (black) to 1 (white)"),
    (np.array([[0, 51, 102]], dtype=np.float32), [0, 51, 102], "0 (black) to 255 (white)"),
    (np.array([[-1, 0, 3]], dtype=np.float32), [0, 64, 255], "-1 (black) to 3 (white)"),
    (np.array([[0, 2**30]], dtype=np.int32), [0, 255], "(white)"),
    (np.array([[7, 7]], dtype=np.int32), [0, 0], None), (np.array([[0, 0]], dtype=np.float32), [0, 0], "(black)"),
    (np.array([[300, 65535]], dtype=np.uint16), [1, 255], None)], ids=str)
def test_other_depths_of_grey_are_not_clipped_in_silence(tmp_path, values, expected, says):
    notes = []
    (tmp_path / "x.tiff").write_bytes(encoded(Image.fromarray(values), "TIFF"))
    got = np.array(load_image(tmp_path / "x.tiff", notes.append))
    assert got[0, :, 0].tolist() == expected
    assert len(notes) == (says is not None) and all(says in note for note in notes)


def test_grey_that_is_no_number_is_a_damaged_picture(tmp_path):
    (tmp_path / "x.tiff").write_bytes(encoded(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), "TIFF"))
    with pytest.raises(Problem, match="damaged .it holds values that are not numbers"):
        load_image(tmp_path / "x.tiff")


def test_an_animation_gives_its_first_frame(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    got = loaded(tmp_path / "x.gif", encoded(red, "GIF", save_all=True, append_images=[blue, blue]))
    assert (got == (255, 0, 0)).all()


def test_broken_exif_does_not_hide_a_picture(tmp_path, recwarn):
    data = encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert loaded(tmp_path / "x.jpg", data).shape == (6, 9, 3) and not recwarn.list


# --- load_image: what is not

def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


EMPTY_PNG = (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
             + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""))
BIG = Image.fromarray(np.kron(PIXELS, np.ones((20, 20, 1), dtype=np.uint8)))


@pytest.mark.parametrize("data, says", [
    (encoded(BIG, "PNG")[:-200], "damaged"), (encoded(BIG, "JPEG")[:-200], "damaged"),
    (encoded(BIG, "WEBP", lossless=True)[:-60], "damaged"), (encoded(BIG, "BMP")[:-200], "damaged"),
    (encoded(BIG, "TIFF")[:2000], "damaged"), (encoded(BIG, "PNG")[:20], "damaged|not a picture"),
    (b"a text file\n", "not a picture"), (b"", "not a picture"), (EMPTY_PNG, "not a picture"),
    (encoded(PICTURE, "PPM"), "convert it to one of PNG"),  # PIL reads dozens of formats; few are meant
], ids=["png", "jpeg", "webp", "bmp", "tiff", "png header", "text", "empty", "0 pixels", "ppm"])
def test_damaged_files_are_one_line(tmp_path, data, says):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(Problem, match=says) as problem:
        load_image(path)
    assert one_line(problem).startswith(f"{path}: ")


def test_paths_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path, says in ((tmp_path / "none.png", "no such picture"), (tmp_path, "is a folder"),
                       (tmp_path / "file" / "x.png", "cannot be read"), (tmp_path / ("x" * 300), "cannot be read")):
        with pytest.raises(Problem, match=says) as problem:
            load_image(path)
        one_line(problem)

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(Problem, match=r"cannot be read \(Permission denied\); check the file"):
        load_image(tmp_path / "file")


@pytest.mark.parametrize("limit, fine", [(54, True), (53, False), (20, False)])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, limit, fine):
    """PIL only warns up to twice the limit; here both are one line. The picture has 54 pixels."""
    PICTURE.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if fine:
        assert load_image(tmp_path / "x.png").size == (9, 6)
        return
    with pytest.raises(Problem, match=f"more than {limit} pixels") as problem:
        load_image(tmp_path / "x.png")
    one_line(problem)


# --- the recipe

@pytest.mark.parametrize("recipe", [{}, {"args": {"prompt": 'a "猫" é 😀\nλ', "lam": 0.7, "n": None, "l": [1, True]}},
                                    {"ref": "caf\udce9.png"}, {"long": "x" * 3_000_000}],
                         ids=["empty", "unicode", "a path that is not UTF-8", "long"])
def test_the_recipe_comes_back(tmp_path, recipe):
    path = tmp_path / "x.png"
    save_png(PICTURE, path, recipe)
    assert read_recipe(path) == recipe and np.array_equal(load_image(path), PIXELS)


def test_pngs_without_a_recipe_are_a_problem(tmp_path):
    save_png(PICTURE, tmp_path / "plain.png")
    (tmp_path / "x.jpg").write_bytes(encoded(PICTURE, "JPEG"))
    for name, text in (("not json.png", "{"), ("not a dict.png", "[1]")):
        info = PngImagePlugin.PngInfo()
        info.add_itxt(RECIPE_KEY, text)
        PICTURE.save(tmp_path / name, pnginfo=info)
    for name in ("plain.png", "x.jpg", "not json.png", "not a dict.png", "."):
        with pytest.raises(Problem, match="holds no isadca recipe") as problem:
            read_recipe(tmp_path / name)
        one_line(problem)
    with pytest.raises(Problem, match="no such picture"):
        read_recipe(tmp_path / "none.png")


# --- atomic_write

@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(type(error)), atomic_write(tmp_path / name) as temporary:
            with open(temporary, "w") as file:
                file.write("half")
            raise error
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_a_finished_write_replaces_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    with atomic_write(tmp_path / "x") as temporary:
        with open(temporary, "w") as file:
            file.write("new")
        assert (tmp_path / "x").read_text() == "old", "nothing is visible before the end"
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "new"


def refuse(*args, **options):
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("broken", [(tempfile, "mkstemp"), (os, "replace"), (Image.Image, "save")],
                         ids=["at the start", "at the end", "within"])
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(*broken, refuse)
    with pytest.raises(Problem, match=r"x.png: cannot write there \(Read-only file system\)") as problem:
        save_png(PICTURE, tmp_path / "x.png")
    assert one_line(problem) and os.listdir(tmp_path) == []


def test_impossible_paths_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/null too, which a rename would replace by a picture
    for path in (tmp_path / "none" / "x.png", tmp_path, tmp_path / ("x" * 300), tmp_path / "pipe"):
        with pytest.raises(Problem, match="cannot write there") as problem:
            save_png(PICTURE, path)
        assert "None" not in one_line(problem)
    assert os.listdir(tmp_path) == ["pipe"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(Problem, match="encoder error"), atomic_write(tmp_path / "x"):
        raise OSError("encoder error")  # PIL's own errors have no strerror


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_file_mode_follows_the_umask(tmp_path, umask, mode):
    """Also where the writer makes a file of its own in place of the temporary one, as safetensors does."""
    before = os.umask(umask)
    try:
        save_png(PICTURE, tmp_path / "x.png")
        with atomic_write(tmp_path / "x.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        assert os.umask(umask) == umask, "the umask itself stays"
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {mode}
