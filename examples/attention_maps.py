"""Where the attention went: pictures of one run, recorded through the seam.

    python examples/attention_maps.py examples/pig.png "a lemon" -o maps.png

Upper part, one row per chosen pixel of the variation (the cross): where ISA looks in the reference, per level and
step. Middle: where each word of the prompt acts. Lower: the share of ISA's attention mass that goes to the
reference, per layer and step (the rest goes to the picture itself).
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

import isadca
from isadca.common.sheets import contact_sheet

TILE = 128


class Record:
    """A kernel: SDPA that also keeps the maps of the text-guided half, averaged over heads.

    looks[t, layer] (P, N): where the P chosen pixels look in the reference, as a distribution over it;
    words[t, layer] (N, M): how much each query looks at each token; share[t, layer]: mass on the reference.
    """

    def __init__(self, points, tokens: int):
        self.points, self.tokens, self.t = points, tokens, None
        self.looks, self.words, self.share, self.hw = {}, {}, {}, {}

    def __call__(self, q, k, v, site):
        n, row = q.shape[2], slice(len(q) - 1, len(q))  # the last row is a text-guided one
        if self.t is not None and site.kind == "self" and k.shape[2] == 2 * n:  # [reference, self]
            mass = torch.stack([isadca.attention_probs(q[row, [h]], k[row, [h]])[0, 0] for h in range(q.shape[1])])
            mass, (height, width) = mass.mean(0), site.hw                      # (N, 2N), head by head for memory
            chosen = [int(y * height) * width + int(x * width) for x, y in self.points]
            looks = mass[chosen, :n]
            self.looks[self.t, site.layer] = looks / looks.sum(1, keepdim=True)
            self.share[self.t, site.layer] = mass[:, :n].sum(1).mean().item()
            self.hw[site.layer] = site.hw
        if self.t is not None and site.kind == "cross" and k.shape[2] == self.tokens:
            self.words[self.t, site.layer] = isadca.attention_probs(q[row], k[row])[0].mean(0)
        return isadca.attend(q, k, v, site)


def record(model, ref, prompt: str, points, method=isadca.Method(lam=0.7, mix="attention")):
    """One variation and its Record. The recorder is told the step by the mix, which knows it."""
    recorder = Record(points, model.text.config.max_tokens)

    def mix(controls):
        recorder.t = controls.t
        return isadca.by_kind(isadca.blend(isadca.attend, isadca.isa(controls.ref_kv, kernel=recorder), controls.lam),
                              isadca.dca(controls.ip_kv, (1 - controls.lam) * method.ip_scale, recorder))

    [picture] = isadca.vary(model, ref, prompt, replace(method, mix=mix))
    return picture, recorder


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


def shares(recorder: Record, times, layers) -> Image.Image:
    """Bars: layers from left to right, one group a step."""
    chart = Image.new("RGB", (TILE * len(times), TILE), "white")
    draw, width = ImageDraw.Draw(chart), (TILE - 12) // len(layers)
    for i, t in enumerate(times):
        for j, layer in enumerate(layers):
            x, y = i * TILE + 6 + j * width, TILE - 14 - recorder.share[t, layer] * (TILE - 30)
            draw.rectangle((x, y, x + width - 3, TILE - 14), "steelblue")
            draw.text((x, TILE - 12), str(layer), "black")
            draw.text((x, y - 12), f"{recorder.share[t, layer]:.0%}"[:-1], "dimgray")
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
    picture, recorder = record(model, ref, args.prompt, points)

    grid = sorted({t for t, _ in recorder.looks}, reverse=True)
    times = [grid[0], grid[len(grid) // 2], grid[-1]]
    layers = sorted(recorder.hw)
    levels = {recorder.hw[layer]: layer for layer in layers}                   # the last layer of each level
    maps = [(hw, layer, t) for hw, layer in sorted(levels.items(), reverse=True) for t in times]
    rows = [[crossed(picture, p), ref.image.resize((TILE, TILE), Image.Resampling.NEAREST)]
            + [heat(recorder.looks[t, layer][i], hw, ref.image) for hw, layer, t in maps] for i, p in enumerate(points)]
    words = model.tokenizer.words(args.prompt)
    fine = levels[max(levels)]
    by_word = [heat(sum(recorder.words[t, fine][:, tokens].sum(1) for t in grid), recorder.hw[fine], picture)
               for _, tokens in words]
    blank = Image.new("RGB", (TILE, TILE), "white")
    big = picture.resize((TILE, TILE), Image.Resampling.NEAREST)
    rows.append(([big, blank] + by_word + [blank] * 99)[: len(rows[0])])
    chart = shares(recorder, times, layers)
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
