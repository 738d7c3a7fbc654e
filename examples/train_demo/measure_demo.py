"""What the demo checkpoint can do, and what the method does with it: the tables of weights/demo/measured.md.

    python examples/train_demo/measure_demo.py [FOLDER] [-o measured.md] [--art FOLDER] [--steps 25] [--references 20]
    python examples/train_demo/measure_demo.py --references 0    # the networks only; --rows text,adapter: some of them

All scenes are held out: their combination of noun, artist, colour and pattern was in no training. Pictures are judged
by the judge of demo_judge.py, which shares nothing with the networks that it judges; CLIP similarities are the demo
CLIP's own. One process a core. Intervals are 95 %: Wilson's for shares of pictures, by resampling the references for
the table of the method. A guidance is chosen on 48 other pictures, not on those that give the figure.
"""

import argparse
import datetime
import math
import os
import platform
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import demo_measures as measures
import demo_world as world
import numpy as np
import torch
from demo_judge import HEADS
from demo_measures import Answers, held_out_scenes, shared, verdict
from demo_metrics import DISTORTIONS, UNSEEN
from PIL import Image
from torch import Tensor

import isadca
from isadca.common.images import clip_pixels
from isadca.common.sheets import contact_sheet
from isadca.methods import PRESETS, Method
from isadca.loop import Run, decode, sample

MIXED = [(mix, lam) for mix in ("noise", "attention") for lam in (0.25, 0.5, 0.7)]  # at the ends they are the same
SYSTEMS = [("λ 0", Method(lam=0)), *((f"λ {lam} {mix}", Method(lam=lam, mix=mix)) for mix, lam in MIXED),
           ("λ 1", Method(lam=1)), ("RIVAL", PRESETS["rival"]), ("RIVAL, editing", PRESETS["rival-edit"]),
           ("IP-Adapter", PRESETS["ip-adapter"])]
PROMPTS = 5  # per reference
SEEDS = range(100, 104)


# ---- the method --------------------------------------------------------------------------------------------------

def measure_method(seed: int) -> tuple[list[list[tuple]], list[Image.Image], str]:
    """One reference, PROMPTS other nouns, every system. -> numbers by prompt and system (see `judged`), and the first
    prompt's pictures with their label."""
    model, rng = shared["model"], np.random.default_rng(seed)
    [scene], [picture] = held_out_scenes(1, seed)
    nouns = rng.choice([n for n in HEADS["noun"] if n != scene.noun], PROMPTS, replace=False).tolist()
    back = isadca.reconstruct(model, isadca.invert(model, picture, 50))
    ref = isadca.invert(model, picture, shared["steps"])
    runs = [Run(world.article(noun), method, (seed,)) for noun in nouns for _, method in SYSTEMS]
    made = [decode(model, z)[0] for z in sample(model, ref, runs)]
    rows = [judged(scene, picture, noun, made[i * len(SYSTEMS):][:len(SYSTEMS)]) for i, noun in enumerate(nouns)]
    return rows, [picture, back, *made[:len(SYSTEMS)]], runs[0].prompt


def judged(scene: world.Scene, reference: Image.Image, noun: str, pictures: list[Image.Image]) -> list[tuple]:
    """For each picture: is it the prompt's noun; the reference's colour and pattern; mean error of the backdrop
    outside the object, in grey levels; CLIP similarity to the prompt and to the reference."""
    outside, real = world.outside(scene), np.asarray(reference, np.float32)
    text = shared["text"].embed(shared["model"].tokenizer([world.article(noun)]))
    similarity = lambda p, other: torch.cosine_similarity(embed(p), other).item()
    return [(s["noun"] == noun, s["colour"] == scene.colour, s["pattern"] == scene.pattern,
             float(np.abs(np.asarray(p, np.float32) - real)[outside].mean()),
             similarity(p, text), similarity(p, embed(reference)))
            for s, p in zip(verdict(pictures), pictures)]


def embed(picture: Image.Image) -> Tensor:
    vision = shared["model"].vision
    return vision(clip_pixels(picture, vision.config.image_size))[0]


# ---- tables ------------------------------------------------------------------------------------------------------

def share(right: list[bool]) -> str:
    """A share of pictures with Wilson's interval: "92 % (87–95)"."""
    n, p, z = len(right), float(np.mean(right)), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * (middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return f"{100 * p:.0f} % ({low:.0f}–{high:.0f})"


def shares(found: Answers) -> str:
    return ", ".join(share(list(column)) for column in zip(*found))


def best_guidance(pool: Executor, task, guidances: tuple[float, ...]) -> float:
    """The guidance with the most right answers, on 48 pictures of seed 99."""
    rounds = list(pool.map(task, [(guidance, 99) for guidance in guidances]))
    return max(zip(guidances, rounds), key=lambda pair: np.mean(pair[1]))[0]


def row(what: str, measured: str, goal: str = "") -> str:
    return f"| {what} | {measured} | {goal} |"


def gathered(pool: Executor, task, tasks) -> list:
    return sum(pool.map(task, tasks), [])


def drawn(pool: Executor, task, guidance: float) -> Answers:
    """192 pictures, one of each noun by four seeds."""
    return gathered(pool, task, [(guidance, seed) for seed in SEEDS])


def text_row(pool: Executor) -> str:
    m = best_guidance(pool, measures.measure_text, (3.0, 5.0, 7.0))
    found = drawn(pool, measures.measure_text, m)
    return row(f"text to image, {len(found)} pictures, guidance {m:g} (of 3, 5, 7): noun, colour, pattern, style",
               shares(found), "98, 99, 93, 90 %")


def adapter_rows(pool: Executor) -> str:
    """The IP-Adapter, and what reaches it through the prior, at the same guidance."""
    a = best_guidance(pool, measures.measure_adapter, (1.5, 3.0, 5.0, 7.0))
    found, told = (drawn(pool, task, a) for task in (measures.measure_adapter, measures.measure_prior))
    return "\n".join([
        row(f"IP-Adapter, empty prompt, {len(found)} pictures, guidance {a:g} (of 1.5, 3, 5, 7): noun, colour, pattern",
            shares(found), "90, 98, 80 %"),
        row(f"prior, then the IP-Adapter, empty prompt, {len(told)} prompts \"a N\", guidance {a:g}: N",
            shares(told), "85 %")])


def controlnet_row(pool: Executor) -> str:
    m = best_guidance(pool, measures.measure_controlnet, (3.0, 5.0, 7.0))
    found = drawn(pool, measures.measure_controlnet, m)
    return row(f"ControlNet Shuffle, {len(found)} pairs with \"a N\", guidance {m:g} (of 3, 5, 7): the reference's "
               "colour, N", shares(found), "80, 90 %")


def variations_row(pool: Executor) -> str:
    found = drawn(pool, measures.measure_variations, 3.0)
    return row(f"image-variations, {len(found)} references, guidance 3: noun, colour", shares(found), "85, 95 %")


def judge_row(pool: Executor) -> str:
    found = gathered(pool, measures.measure_judge, SEEDS[:2])
    return row(f"the judge itself, {len(found)} real scenes: noun, style, colour, pattern", shares(found), "99 % each")


def clip_rows(pool: Executor) -> str:
    found = gathered(pool, measures.measure_clip, SEEDS[:2])
    nearest, averaged = [answers[:3] for answers in found], [answers[3:] for answers in found]
    return "\n".join([
        row(f"CLIP pair, zero-shot, {len(found)} scenes, the nearest of 1,536 sentences: noun, colour, pattern",
            shares(nearest), "90, 99, 95 %"),
        row("the same by the mean of each word's sentences", shares(averaged), "90, 99, 95 %")])


def vae_row(pool: Executor) -> str:
    found = gathered(pool, measures.measure_vae, SEEDS[:2])
    return row(f"VAE, PSNR over {len(found)} scenes", f"{np.mean(found):.1f} dB", "32 dB")


def reconstruction_row(pool: Executor) -> str:
    found = gathered(pool, measures.measure_reconstruction, range(100, 112))
    return row(f"reconstruction, 50 steps, PSNR over {len(found)} scenes", f"{np.mean(found):.1f} dB", "31 dB")


def trunk_rows(pool: Executor) -> str:
    kinds = ("alex", "vgg", "inception")
    return "\n".join(row(f"{kind} as a classifier, {len(found)} scenes: noun, colour, pattern", shares(found),
                         "85, 95, 95 %") for kind, found in zip(kinds, pool.map(measures.measure_trunk, kinds)))


def lpips_rows(pool: Executor) -> str:
    return "\n".join(lpips_row(pool, kind) for kind in ("alex", "vgg"))


def lpips_row(pool: Executor, kind: str) -> str:
    hows = [*DISTORTIONS, *UNSEEN]
    found = dict(zip(hows, pool.map(measures.measure_lpips, [(kind, how) for how in hows])))
    known, unseen = (sum((found[how] for how in part), []) for part in (DISTORTIONS, UNSEEN))
    worst = min(hows, key=lambda how: np.mean(found[how]))
    return row(f"LPIPS {kind}: the stronger of two distortions is farther, {len(known)} pairs of kinds trained on, "
               f"{len(unseen)} of others, the worst kind ({worst})",
               ", ".join(share(x) for x in (known, unseen, found[worst])), "85 %")


ROWS = {"judge": judge_row, "clip": clip_rows, "vae": vae_row, "reconstruction": reconstruction_row,
        "trunks": trunk_rows, "lpips": lpips_rows, "text": text_row, "adapter": adapter_rows,
        "controlnet": controlnet_row, "variations": variations_row}


def method_table(pool: Executor, seeds: range) -> tuple[str, Image.Image]:
    """The table of the systems, and a sheet of the first references' pictures."""
    found = list(pool.map(measure_method, seeds))
    numbers = np.array([rows for rows, _, _ in found], float)  # (references, prompts, systems, 6)
    means = numbers.mean((0, 1))
    picks = np.random.default_rng(0).integers(len(found), size=(1000, len(found)))
    resampled = numbers.mean(1)[picks].mean(1)
    spread = (np.quantile(resampled, 0.975, axis=0) - np.quantile(resampled, 0.025, axis=0)) / 2
    lines = []
    for (name, _), mean, half in zip(SYSTEMS, means, spread):
        cells = [f"{100 * x:.0f} ± {100 * d:.0f} %" for x, d in zip(mean[:3], half[:3])]
        cells += [f"{mean[3]:.1f} ± {half[3]:.1f}", *(f"{x:.3f} ± {d:.3f}" for x, d in zip(mean[4:], half[4:]))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = ("| system | prompt's noun | R's colour | R's pattern | backdrop error | CLIP to prompt | CLIP to R |\n"
            "|---|---|---|---|---|---|---|\n")
    return (f"{numbers.shape[0] * numbers.shape[1]} pairs of a reference R ({len(found)} of them) and a prompt \"a N\" "
            "with another noun:\n\n" + head + "\n".join(lines),
            contact_sheet([pictures for _, pictures, _ in found[:8]],
                          ["reference", "reconstruction", *(name.replace("λ", "lambda") for name, _ in SYSTEMS)],
                          [label for _, _, label in found[:8]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[2] / "weights/demo")
    parser.add_argument("-o", "--out", type=Path, help="write the tables there, and a sheet of pictures beside them")
    parser.add_argument("--art", type=Path, default=Path("art"), help="where the art is kept")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--references", type=int, default=20, help=f"{PROMPTS} pairs each; 0: no method table")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {','.join(ROWS)}, or none")
    args = parser.parse_args()
    world.fetch_art(args.art)  # before the processes start
    began, cores, parts, sheet = time.monotonic(), os.cpu_count(), [], None
    with ProcessPoolExecutor(cores, get_context("spawn"), measures.start, (args.folder, args.art, args.steps)) as pool:
        if args.rows != "none":
            rows = [ROWS[name](pool) for name in args.rows.split(",")]
            parts.append("| what | measured | goal |\n|---|---|---|\n" + "\n".join(rows))
        if args.references:
            table, sheet = method_table(pool, range(200, 200 + args.references))
            parts.append(table)
    parts.append(f"*{args.steps} steps; {cores} cores ({platform.machine()}), torch {torch.__version__}, "
                 f"{datetime.date.today()}, {(time.monotonic() - began) / 60:.0f} minutes.*\n")
    print(text := "\n\n".join(parts))
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        if sheet is not None:
            sheet.save(args.out.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
