"""Pictures to tensors and back, the two resize rules, PSNR and the contact sheet. Files are in test_image_files.py."""

import numpy as np
import pytest
import torch
from PIL import Image

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # transformers 4, where the one on PIL has the plain name
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

from isadca.common.images import clip_pixels, fit, to_images, to_tensor
from isadca.common.sheets import contact_sheet
from isadca.evaluation.metrics import psnr


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- PIL <-> tensor

def test_all_256_values_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values, values.T, values[::-1]], axis=-1))
    x = to_tensor(picture)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1 and torch.equal(x[0, 0].flatten(), x[0, 0].flatten().sort().values)
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert np.array_equal(to_images(x.to(dtype))[0], picture)


def test_to_images_clips_rounds_and_keeps_the_order():
    x = torch.tensor([-9.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.0, 9.0]).view(6, 1, 1, 1).expand(6, 3, 2, 4)
    pictures = to_images(x.requires_grad_())
    assert [p.size for p in pictures] == [(4, 2)] * 6
    assert [p.getpixel((0, 0)) for p in pictures] == [(v, v, v) for v in (0, 0, 0, 1, 255, 255)]


def test_channels_and_axes_are_not_swapped():
    picture = Image.new("RGB", (3, 2), (255, 0, 0))
    picture.putpixel((2, 0), (0, 0, 255))
    x = to_tensor(picture)
    assert x.shape == (1, 3, 2, 3) and x[0, :, 0, 2].tolist() == [-1, -1, 1] and x[0, :, 1, 2].tolist() == [1, -1, -1]


# --- the resize rules

@pytest.mark.parametrize("width, height", [(8, 8), (9, 8), (11, 8), (8, 9), (8, 13), (200, 8), (8, 31)])
def test_fit_takes_the_centre_square(width, height):
    """Without any resampling where the short side is already right; odd rests lose the extra pixel at the end."""
    picture = noise(width, height)
    left, top = (width - 8) // 2, (height - 8) // 2
    assert np.array_equal(fit(picture, (8, 8)), np.asarray(picture)[top : top + 8, left : left + 8])


@pytest.mark.parametrize("width, height", [(300, 100), (100, 301), (64, 64), (32, 20), (7, 200), (1, 1)])
def test_fit_resizes_nothing_but_that_square(width, height):
    """Whatever lies outside the centre does not leak in, at any size; the result is size × size."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[top : top + side, left : left + side] = (10, 200, 90)
    got = np.asarray(fit(Image.fromarray(pixels), (64, 64)))
    assert got.shape == (64, 64, 3) and (got == (10, 200, 90)).all()


@pytest.mark.parametrize("has", [(300, 100), (100, 301), (64, 64), (96, 64), (7, 200), (1, 1)])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 192)])
def test_fit_to_any_shape(has, size):
    """A disc in the middle stays one where the picture is cut or gets borders; "squash" keeps the corners."""
    (width, height), (w, h) = has, size
    scale = min(width / w, height / h)
    left, top = round(width - w * scale) // 2, round(height - h * scale) // 2
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[top : height - top, left : width - left] = (10, 200, 90)
    picture = Image.fromarray(pixels)
    assert (np.asarray(fit(picture, size))[1:-1, 1:-1] == (10, 200, 90)).all()
    squashed = picture.resize(size, Image.Resampling.BICUBIC)
    assert fit(picture, size, "squash").tobytes() == squashed.tobytes()
    if min(has) > 1:
        padded = np.asarray(fit(Image.new("RGB", has), size, "pad"))
        black = (padded.max(2) < 128).sum() / (w * h)
        share = scale / max(width / w, height / h)  # the picture's, of the canvas
        assert black == pytest.approx(share, rel=0.3)


def test_fit_and_clip_pixels_take_any_mode():
    """A picture that did not come through load_image: transparency is white here too, grey is three channels."""
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert np.array_equal(fit(clear, (10, 10)), np.full((10, 10, 3), 255))
    assert torch.equal(clip_pixels(clear, 8), clip_pixels(Image.new("RGB", (20, 10), "white"), 8))
    assert to_tensor(fit(Image.new("L", (9, 9), 255), (4, 4))).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("width, height", [(224, 224), (512, 512), (64, 64), (300, 200), (200, 300), (225, 224),
                                           (641, 359), (359, 641), (100, 37), (31, 400), (3, 1), (1, 1)])
@pytest.mark.parametrize("size", [224, 32])
def test_clip_pixels_equals_transformers(width, height, size):
    """transformers' processor on PIL: the one whose resize is antialiased in 8 bits, as CLIP was trained."""
    picture = noise(width, height)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = torch.as_tensor(np.array(theirs(picture)["pixel_values"]))
    got = clip_pixels(picture, size)
    assert got.shape == (1, 3, size, size) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)


def test_clip_pixels_normalises_by_clips_own_numbers():
    got = clip_pixels(Image.new("RGB", (50, 40), (255, 128, 0)), 16)
    expected = [(1 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (0 - 0.40821073) / 0.27577711]
    np.testing.assert_allclose(got[0].numpy(), np.broadcast_to(np.reshape(expected, (3, 1, 1)), (3, 16, 16)), rtol=1e-5)


# --- PSNR

def test_psnr_equals_the_definition():
    a, b = noise(17, 9), noise(17, 9, seed=1)
    x, y = np.array(a).astype(float), np.array(b).astype(float)
    assert psnr(a, b) == psnr(b, a) == pytest.approx(20 * np.log10(255) - 10 * np.log10(((x - y) ** 2).mean()))
    grey = [Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 5, 255)]
    assert psnr(grey[0], grey[1]) == pytest.approx(20 * np.log10(51)) and psnr(grey[1], grey[1]) == float("inf")
    assert psnr(grey[0], grey[2]) == psnr(grey[2], grey[0]) == 0, "8-bit differences must not wrap around"
    assert psnr(Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 8)) == pytest.approx(20 * np.log10(255))


# --- the contact sheet

def tiles_of(sheet: Image.Image, count: int) -> list[tuple[int, int, int, int]]:
    """The boxes (left, top, right, bottom) of tiles that are each of one colour (200 + j, 3, 77), in order of j."""
    red, green, blue = np.asarray(sheet).transpose(2, 0, 1)
    boxes = []
    for j in range(count):
        ys, xs = np.nonzero((red == 200 + j) & (green == 3) & (blue == 77))
        boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        assert len(xs) == (boxes[-1][2] - boxes[-1][0]) * (boxes[-1][3] - boxes[-1][1]), "not one whole rectangle"
    return boxes


@pytest.mark.parametrize("size, tile", [((64, 64), (128, 128)), ((32, 32), (128, 128)), ((128, 128), (128, 128)),
                                        ((100, 100), (128, 128)), ((512, 512), (512, 512)), ((64, 96), (128, 192)),
                                        ((192, 128), (192, 128))])
def test_tiles_lie_in_a_grid_and_cover_no_text(size, tile):
    flat = [Image.new("RGB", size, (200 + j, 3, 77)) for j in range(6)]
    sheet = contact_sheet([flat[:3], flat[3:]], ["a", "b", "c"], ["first", "second"])
    boxes = tiles_of(sheet, 6)
    assert all((right - left, bottom - top) == tile for left, top, right, bottom in boxes)
    lefts, tops = [b[0] for b in boxes], [b[1] for b in boxes]
    assert lefts[:3] == lefts[3:] == sorted(lefts[:3]) and len(set(tops[:3])) == len(set(tops[3:])) == 1
    gap = lefts[0]
    assert gap > 0 and np.diff(lefts[:3]).tolist() == [tile[0] + gap] * 2, "tiles must not touch"
    assert sheet.size == (boxes[-1][2] + gap, boxes[-1][3] + gap), "the margin is the same on all sides"
    pixels = np.asarray(sheet.convert("L"))
    heading, label, second = pixels[: tops[0] // 2], pixels[tops[0] // 2 : tops[0]], pixels[boxes[0][3] : tops[3]]
    assert all(band.min() < 160 for band in (heading, label, second)), "each band holds its text"


@pytest.mark.parametrize("size", [32, 64, 128, 200])
def test_every_picture_is_in_its_place_unblurred(size):
    """Small pictures are enlarged by whole pixels, others are copied."""
    places = tiles_of(contact_sheet([[Image.new("RGB", (size, size), (200 + j, 3, 77)) for j in (0, 1)]],
                                    ["", ""], [""]), 2)
    pictures = [noise(size, size, seed) for seed in (1, 2)]
    sheet = contact_sheet([pictures], ["left", "right"], ["row"])
    times = places[0][2] - places[0][0]
    for picture, box in zip(pictures, places):
        big = np.kron(np.asarray(picture), np.ones((times // size, times // size, 1), dtype=np.uint8))
        assert np.array_equal(sheet.crop(tuple(map(int, box))), big)


def test_long_and_broken_texts_stay_in_their_own_cell():
    """A heading ends where its column ends; a line break in a prompt is a space; nothing is drawn over a tile."""
    flat = [Image.new("RGB", (128, 128), (200 + j, 3, 77)) for j in range(4)]
    rows = [flat[:2], flat[2:]]
    long = contact_sheet(rows, ["W" * 500, ""], ["one\ntwo " * 900, "g\n" * 50])
    short = contact_sheet(rows, ["", ""], ["", ""])
    boxes = tiles_of(long, 4)
    assert boxes == tiles_of(short, 4)
    assert contact_sheet(rows, ["", ""], ["one\n two", ""]) == contact_sheet(rows, ["", ""], ["one two", ""])
    head = np.asarray(long)[: boxes[0][1] // 2]
    assert head[:, : boxes[0][2]].min() < 100 and head[:, boxes[1][0]:].min() == 255
