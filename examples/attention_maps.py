"""Where the attention went: pictures of one run, recorded through the seam.

    python examples/attention_maps.py examples/pig.png "a lemon" -o maps.png

Upper part, one row per chosen pixel of the variation (the cross): where ISA looks in the reference, per level and
step. Middle: where each word of the prompt acts. Lower: the share of ISA's attention mass that goes to the
reference, per layer and step (the rest goes to the picture itself).
"""

import argparse

import numpy as np
import torch
from PIL import Image, ImageDraw

import isadca
from isadca.common.sheets import contact_sheet

TILE = 128


class Seen:
    """What the pictures show of a run's maps.

    looks[t, layer] (P, N): where the P chosen pixels look in the reference, as a distribution over it;
    words[t, layer] (N, M): how much each query looks at each token; share[t, layer]: mass on the reference.
    """

    def __init__(self, points, tokens: int):
        self.points, self.tokens = points, tokens
        self.looks, self.words, self.share, self.hw = {}, {}, {}, {}

    def take(self, maps) -> None:
        """What is needed of one step's maps, which are then dropped: all of them would not fit into memory."""
        for site, t, _, probs in maps:
            n, (height, width) = len(probs), site.hw
            if site.kind == "self" and probs.shape[1] == 2 * n:  # [reference, self]
                chosen = [int(y * height) * width + int(x * width) for x, y in self.points]
                looks = probs[chosen, :n]
                self.looks[t, site.layer] = looks / looks.sum(1, keepdim=True)
                self.share[t, site.layer] = probs[:, :n].sum(1).mean().item()
                self.hw[site.layer] = site.hw
            if site.kind == "cross" and probs.shape[1] == self.tokens:
                self.words[t, site.layer] = probs
        maps.clear()


def record(model, ref, prompt: str, points, method=isadca.Method(lam=0.7, mix="attention")):
    """One variation, and what was seen in its maps."""
    recorder, seen = isadca.record(method), Seen(points, model.tokenizer.max_tokens)
    [picture] = isadca.vary(model, ref, prompt, recorder.method, on_step=lambda *step: seen.take(recorder.maps))
    return picture, seen


def heat(values: torch.Tensor, hw, under: Image.Image) -> Image.Image:
    """A map over a picture: bright where it is high."""
    grid = (values / values.max()).view(hw).float().cpu().numpy()
    mask = Image.fromarray((grid * 255).astype(np.uint8)).resize((TILE, TILE), Image.Resampling.BILINEAR)
    dark = Image.blend(under.resize((TILE, TILE), Image.Resampling.NEAREST), Image.new("RGB", (TILE, TILE)), 0.75)
    return Image.composite(Image.new("RGB", (TILE, TILE), (255, 230, 40)), dark, mask)


def crossed(picture: Image.Image, point) -> Image.Image:
    big = picture.resize((TILE, TILE), Image.Resampling.NEAREST)
    x, y = (int(c * TILE) for c in point)
    draw = ImageDraw.Draw(big)
    for width, colour in ((5, "black"), (1, "white")):
        draw.line((x - 7, y, x + 7, y), colour, width)
        draw.line((x, y - 7, x, y + 7), colour, width)
    return big


def shares(seen: Seen, times, layers) -> Image.Image:
    """Bars: layers from left to right, one group of bars for each step."""
    chart = Image.new("RGB", (TILE * len(times), TILE), "white")
    draw, width = ImageDraw.Draw(chart), (TILE - 12) // len(layers)
    for i, t in enumerate(times):
        for j, layer in enumerate(layers):
            x, y = i * TILE + 6 + j * width, TILE - 14 - seen.share[t, layer] * (TILE - 30)
            draw.rectangle((x, y, x + width - 3, TILE - 14), "steelblue")
            draw.text((x, TILE - 12), str(layer), "black")
            draw.text((x, y - 12), f"{seen.share[t, layer]:.0%}"[:-1], "dimgray")
    return chart


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ref")
    parser.add_argument("prompt")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--points", default="0.08,0.08;0.5,0.5;0.9,0.6", help="x,y;... as fractions")
    args = parser.parse_args(argv)

    model = isadca.load(args.weights)
    ref = isadca.invert(model, isadca.load_image(args.ref), args.steps)
    points = [tuple(map(float, p.split(","))) for p in args.points.split(";")]
    picture, seen = record(model, ref, args.prompt, points)

    grid = sorted({t for t, _ in seen.looks}, reverse=True)
    times = [grid[0], grid[len(grid) // 2], grid[-1]]
    layers = sorted(seen.hw)
    levels = {seen.hw[layer]: layer for layer in layers}  # the last layer of each level
    maps = [(hw, layer, t) for hw, layer in sorted(levels.items(), reverse=True) for t in times]
    rows = [[crossed(picture, p), ref.image.resize((TILE, TILE), Image.Resampling.NEAREST)]
            + [heat(seen.looks[t, layer][i], hw, ref.image) for hw, layer, t in maps] for i, p in enumerate(points)]
    words = model.tokenizer.words(args.prompt)
    fine = levels[max(levels)]
    by_word = [heat(sum(seen.words[t, fine][:, tokens].sum(1) for t in grid), seen.hw[fine], picture)
               for _, tokens in words]
    blank = Image.new("RGB", (TILE, TILE), "white")
    big = picture.resize((TILE, TILE), Image.Resampling.NEAREST)
    rows.append(([big, blank] + by_word + [blank] * 99)[: len(rows[0])])
    chart = shares(seen, times, layers)
    bars = [chart.crop((i * TILE, 0, (i + 1) * TILE, TILE)) for i in range(len(times))]
    rows.append(([blank, blank] + bars + [blank] * 99)[: len(rows[0])])
    headings = ["variation", "reference"] + [f"{hw[0]}x{hw[1]}, t={t}" for hw, _, t in maps]
    labels = [f"ISA from the pixel at {p}" for p in points] + [
        "where the words act: " + ", ".join(word for word, _ in words),
        f"% of ISA's mass on the reference, by layer, at t={times}"]
    contact_sheet(rows, headings, labels).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
