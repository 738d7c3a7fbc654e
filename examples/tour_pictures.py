"""The small pictures of tour.py, drawn with PIL alone. Each function returns one picture."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE, GAP, LINE = 128, 6, 17
INK, SOFT, BLUE, ORANGE = "#23262b", "#5f646d", "#1f6f8b", "#b4551d"
FONT = ImageFont.load_default(size=12)


def row(*tiles: tuple[str, Image.Image]) -> Image.Image:
    """Pictures beside each other, each with its caption below."""
    return sheet([list(tiles)])


def sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of captioned pictures; a caption has two lines at most."""
    deep = [TILE + LINE * max(caption.count("\n") + 1 for caption, _ in tiles) + GAP for tiles in rows]
    canvas = Image.new("RGB", (max(map(len, rows)) * (TILE + GAP) - GAP, sum(deep)), "white")
    draw = ImageDraw.Draw(canvas)
    for j, tiles in enumerate(rows):
        top = sum(deep[:j])
        for i, (caption, image) in enumerate(tiles):
            left = i * (TILE + GAP)
            canvas.paste(enlarged(image), (left, top))
            draw.multiline_text((left, top + TILE + 1), caption, SOFT, FONT, spacing=2)
    return canvas


def enlarged(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)


def grey(values: Tensor) -> Image.Image:
    """A matrix (h,w), its lowest value black and its highest white."""
    values = (values - values.min()) / (values.max() - values.min())
    return Image.fromarray((values * 255).byte().numpy())


def heat(weights: Tensor, hw: tuple[int, int], under: Image.Image, at: int | None = None) -> Image.Image:
    """Attention weights (h·w,) as light over a picture; `at` is the cell that gets a frame."""
    light = (weights / weights.max()).sqrt().view(hw).numpy()
    mask = Image.fromarray((light * 230).astype(np.uint8)).resize((TILE, TILE), Image.Resampling.NEAREST)
    dark = Image.blend(enlarged(under), Image.new("RGB", (TILE, TILE)), 0.6)
    lit = Image.composite(Image.new("RGB", (TILE, TILE), "#ffe16e"), dark, mask)
    return lit if at is None else framed(lit, hw, at)


def framed(image: Image.Image, hw: tuple[int, int], at: int) -> Image.Image:
    """The picture with a frame around one cell of the grid."""
    big, (h, w) = enlarged(image), hw
    x, y = at % w * TILE // w, at // w * TILE // h
    ImageDraw.Draw(big).rectangle((x - 2, y - 2, x + TILE // w + 1, y + TILE // h + 1), outline="white", width=2)
    return big


def matrix(weights: Tensor, columns: list[str]) -> Image.Image:
    """A small matrix (N,M) as squares with their numbers; a row is a query, a column a key."""
    n, m = weights.shape
    cell, left = 46, 58
    canvas = Image.new("RGB", (left + m * cell + 1, LINE + n * cell + 1), "white")
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate(columns):
        draw.text((left + (j + 0.5) * cell, 1), name, SOFT, FONT, anchor="ma")
    for i in range(n):
        draw.text((0, LINE + (i + 0.5) * cell), f"query {i}", SOFT, FONT, anchor="lm")
        for j in range(m):
            x, y, weight = left + j * cell, LINE + i * cell, weights[i, j].item()
            fill = tuple(round(255 + (end - 255) * weight) for end in (31, 111, 139))
            draw.rectangle((x, y, x + cell, y + cell), fill, "white")
            ink = "white" if weight > 0.5 else INK
            draw.text((x + cell / 2, y + cell / 2), f"{weight:.2f}", ink, FONT, anchor="mm")
    return canvas


def curves(x: list[float], lines: dict[str, list[float]], label: str) -> Image.Image:
    """Lines from 0 to 1 over x, named at their right ends. Drawn large and made smaller, for smooth edges."""
    width, height, left, right, bottom = 520, 190, 26, 400, 160
    draw_x = [left + (right - left) * (v - min(x)) / (max(x) - min(x)) for v in x]
    big = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(big), ImageFont.load_default(size=24)
    draw.line([(2 * left, 20), (2 * left, 2 * bottom), (2 * right, 2 * bottom)], "#c9c5bb", 2)
    for text, at, anchor in [("1", (left - 6, 10), "rm"), ("0", (left - 6, bottom), "rm"),
                             (f"{x[0]:g}", (draw_x[0], bottom + 5), "ma"),
                             (f"{x[-1]:g}", (draw_x[-1], bottom + 5), "ma"),
                             (label, ((left + right) / 2, bottom + 5), "ma")]:
        draw.text([2 * v for v in at], text, SOFT, font, anchor=anchor)
    for (name, values), colour in zip(lines.items(), (BLUE, ORANGE)):
        points = [(2 * px, 2 * (bottom - (bottom - 10) * v)) for px, v in zip(draw_x, values)]
        draw.line(points, colour, 4, joint="curve")
        draw.text((points[-1][0] + 12, points[-1][1]), name, colour, font, anchor="lm")
    return big.resize((width, height), Image.Resampling.LANCZOS)


def difference(a: Image.Image, b: Image.Image) -> int:
    """The greatest difference between two pictures, in grey levels of 255."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def border_colour(image: Image.Image) -> Tensor:
    """The mean colour of the outermost four pixels: the backdrop's, without the object."""
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32))
    edge = torch.ones(pixels.shape[:2], dtype=torch.bool)
    edge[4:-4, 4:-4] = False
    return pixels[edge].mean(0)
