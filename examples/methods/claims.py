"""What each paper claims, as one figure on the demo: the method beside the same run without it.

    python examples/methods/claims.py [--seeds 8] [--steps 25] [--into examples/methods/README.md]

"a lemon" with the pig as reference, one picture per seed. The object is what differs from the picture's median colour;
positions are shares of the width; nouns and backdrops are the judge's of measure.py. Offline, one process.
"""

import argparse
import datetime
import time
from collections import Counter
from dataclasses import replace

import measure
import numpy as np
import torch

import isadca
from isadca.common.images import to_tensor
from isadca.evaluation.metrics import ssim

PLAIN, ADAPTER = isadca.PRESETS["plain"], isadca.PRESETS["ip-adapter"]
HERE = replace(PLAIN, init="inverted", diversity=0.3)  # text only, from near the end of the reference's inversion


def thing(picture) -> np.ndarray:
    """Where the object is, (h,w) bool."""
    pixels = np.asarray(picture, float)
    return np.abs(pixels - np.median(pixels, (0, 1))).max(-1) > 60


def centre(pictures) -> float:
    """The object's place from left to right, 0 to 1, on average."""
    return np.mean([np.mean(np.nonzero(thing(p))[1]) / p.width for p in pictures])


def off(pictures, reference) -> float:
    """The distance between the object's centre and that of the reference's object, as a share of the width."""
    at = lambda p: np.array([np.mean(i) / p.width for i in np.nonzero(thing(p))])
    return np.mean([np.linalg.norm(at(p) - at(reference)) for p in pictures])


def shown(pictures, word: str) -> float:
    return 100 * np.mean([measure.verdict(p)["noun"] == word for p in pictures])


def alike(pictures) -> float:
    """The share of pictures with the most frequent backdrop, in per cent."""
    seen = [tuple(measure.verdict(p)[name] for name in ("colour", "pattern")) for p in pictures]
    return 100 * Counter(seen).most_common(1)[0][1] / len(seen)


def coloured(pictures, reference) -> float:
    """The share of pictures with the colour of the reference's backdrop, in per cent."""
    return 100 * np.mean([measure.verdict(p)["colour"] == measure.verdict(reference)["colour"] for p in pictures])


def near(pictures, others) -> float:
    return np.mean([ssim(to_tensor(a), to_tensor(b)).item() for a, b in zip(pictures, others)])


def claims(make, gallery: dict, reference) -> list[tuple]:
    """(method, what is measured, without, with)."""
    m = lambda name, **changes: make(replace(gallery[name], **changes))
    (plain, slow), (gated, fast) = make(PLAIN), m("t-gate")
    one, start = make(replace(PLAIN, guidance=1))[0], make(HERE)[0]
    noun, place = "the prompt's noun is seen, %", "the object's distance from the reference's"
    return [
        ("dense-diffusion", "the object's place, 0 left to 1 right", centre(plain), centre(m("dense-diffusion")[0])),
        ("reweight", f"without guidance: {noun}", shown(one, "lemon"), shown(m("reweight", guidance=1)[0], "lemon")),
        ("nag", f"without guidance: {noun}", shown(one, "lemon"), shown(m("nag")[0], "lemon")),
        ("pag", f"without guidance: {noun}", shown(one, "lemon"), shown(m("pag", guidance=1)[0], "lemon")),
        ("seg", f"without guidance: {noun}", shown(one, "lemon"), shown(m("seg")[0], "lemon")),
        ("t-gate", "CPU seconds a picture", slow, fast),
        ("t-gate", "SSIM to the picture without it", 1, near(gated, plain)),
        ("todo", "SSIM to the picture without it", 1, near(m("todo")[0], plain)),
        ("story-diffusion", "pictures with the same backdrop, %", alike(plain), alike(m("story-diffusion")[0])),
        ("attend-and-excite", f"without guidance: {noun}", shown(one, "lemon"),
         shown(m("attend-and-excite", guidance=1)[0], "lemon")),
        ("instant-style", noun, shown(make(ADAPTER)[0], "lemon"), shown(m("instant-style")[0], "lemon")),
        ("style-aligned", "SSIM to the reference", near(plain, [reference] * len(plain)),
         near(m("style-aligned")[0], [reference] * len(plain))),
        ("style-id", "the reference's colour is seen, %", coloured(plain, reference),
         coloured(m("style-id")[0], reference)),
        *((name, place, off(start, reference), off(m(name, diversity=HERE.diversity)[0], reference))
          for name in ("prompt-to-prompt", "fate-zero", "plug-and-play", "masactrl-masks", "cross-image")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--into", type=measure.Path, help="a README: its table is replaced")
    args = parser.parse_args()
    measure.start([], args.steps)
    model, picture = measure.shared["model"], isadca.load_image(measure.HERE.parent / "pig.png")
    refs = {maps: isadca.invert(model, picture, args.steps, "a pig" if maps else "") for maps in (False, True)}

    def make(method):
        began, ref, seeds = time.process_time(), refs[method.ref_maps], range(args.seeds)
        if method.name == "style-id":
            made = [measure.styled(model, method, refs[False], "a lemon", (seed,))[0] for seed in seeds]
        else:
            made = isadca.vary(model, ref, "a lemon", method, seeds=seeds)
        return made, (time.process_time() - began) / args.seeds
    with torch.no_grad():  # Attend-and-Excite takes a gradient of its own
        found = claims(make, measure.systems([]), refs[False].image)
    lines = ["| method | figure | without | with |", "|---" * 4 + "|"]
    lines += [f"| {name} | {what} | {without:.2f} | {with_it:.2f} |".replace(".00 |", " |")
              for name, what, without, with_it in found]
    text = "\n".join(lines) + f"\n\n*{args.seeds} seeds, {args.steps} steps, {datetime.date.today()}.*"
    print(text)
    if args.into:
        measure.put(text, args.into, "claims")


if __name__ == "__main__":
    main()
