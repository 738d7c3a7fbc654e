"""Inversion as a choice: how exact it is, how many steps a variation needs, and what --keep adds. Three tables.

    python examples/methods/inversion.py [--pairs 40] [--tables exact,steps,keep] [--into examples/methods/README.md]

`exact`: PSNR of a reconstruction to the VAE's own round trip, and the deviation of z_T, which is 1 for noise.
`steps`: variations at λ = 0.7, by the steps of the inversion and of the sampling. `keep`: the same with the backdrop
kept. The references are the ten of weights/demo/pairs, with prompts "a N" of other nouns. The judge is measure.py's;
backdrop error is the mean over all pixels outside the object's square, in grey levels. Offline, one process per core.
"""

import argparse
import datetime
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import measure
import numpy as np
import torch
from PIL import Image

import isadca
from isadca.evaluation.metrics import psnr

import demo_world as world  # measure.py has put its folder on the path

EXACT, COMPARED, LONG = (10, 20, 50), (10, 15, 20, 50), 100  # steps of the first and second table; a long inversion's
SAME = 100.0  # dB, for pictures that are equal; of this size, those with one value off by one have 89
COLUMNS = ("prompt's noun", "R's colour", "R's pattern", "SSIM to R", "backdrop error")


class Task(NamedTuple):
    """A reference and its prompts."""

    picture: Image.Image
    scene: world.Scene
    prompts: list[str]


def tasks(pairs: int) -> list[Task]:
    """The references take the pairs in turn. Their scenes are drawn as train_others.save_pairs drew them."""
    rng, found = np.random.default_rng(11), []
    for i in range(min(pairs, 10)):
        scene = world.random_scene(rng, unseen=True)
        rng.choice(len(world.NOUNS) - 1, 2, replace=False)  # the prompts of pairs.csv
        others = [noun for noun in world.NOUNS if noun != scene.noun]
        nouns = np.random.default_rng(i).permutation(others)[:len(range(i, pairs, 10))].tolist()
        picture = isadca.load_image(measure.DEMO / "pairs" / f"{i:02d}-{scene.noun}.png")
        found.append(Task(picture, scene, [world.article(noun) for noun in nouns]))
    return found


# ---- one reference: rows of a name and numbers, to be averaged by name ---------------------------------------------

def exact(task: Task) -> list[tuple[str, list[float]]]:
    """PSNR and the deviation of z_T, for each of EXACT."""
    model, picture = measure.shared["model"], task.picture
    long = isadca.invert(model, picture, LONG)
    [best] = isadca.decode(model, long.chain[:1])
    ways = {"DDIM, RIVAL's label (2 T)": lambda T: isadca.invert(model, picture, T),
            "DDIM, the textbook's label (2 T)": lambda T: textbook(model, long.every(LONG // T)),
            "one fixed-point iteration (3 T)": lambda T: isadca.invert(model, picture, T, fixed_point=1),
            "two iterations (4 T)": lambda T: isadca.invert(model, picture, T, fixed_point=2),
            f"DDIM with {LONG} steps, sampled with T ({LONG} + T)": lambda T: long.every(LONG // T)}
    def row(pairs):
        return [x for back, z_T in pairs for x in (min(psnr(back, best), SAME), z_T.std().item())]
    rows = [(name, row((isadca.reconstruct(model, ref), ref.chain[-1]) for ref in map(way, EXACT)))
            for name, way in ways.items()]
    return [*rows, ("O-BELM (2 T - 1)", row(there_and_back(model, picture, T) for T in EXACT))]


def textbook(model, ref: isadca.Reference) -> isadca.Reference:
    """The same picture inverted anew, each stride labelled with the level that z̄ is at; the clean one is 0."""
    context, chain = model.context([ref.prompt]), [ref.chain[:1]]
    for stride in model.schedule.steps(ref.steps)[::-1]:
        eps = model.noise(chain[-1], max(stride.t_prev, 0), context)
        chain.append(model.schedule.inverse_step(chain[-1], eps, stride))
    return replace(ref, chain=torch.cat(chain))


def there_and_back(model, picture: Image.Image, T: int) -> tuple[Image.Image, torch.Tensor]:
    """O-BELM, arXiv 2410.07273, T steps up and down again: the picture and z_T. Here x is z / √ᾱ, and σ is √(1/ᾱ - 1):
    a step along the levels i+1, i, i-1 has one noise prediction, at i, and is linear in the outer two. So either
    follows exactly from the other; the sampler undoes itself."""
    grid, clean = model.schedule.steps(T)[::-1], isadca.invert(model, picture, 1).chain[:1]
    levels = [model.schedule.alpha_bar(t) for t in (grid[0].t_prev, *(stride.t for stride in grid))]
    sigma, context = [(1 / level - 1) ** 0.5 for level in levels], model.context([""])

    def noise(i, x):  # below the first step's level is the clean latent, which has the same label
        return model.noise(levels[i] ** 0.5 * x, grid[max(i - 1, 0)].t, context)
    x = [clean / levels[0] ** 0.5]
    x.append(x[0] + (sigma[1] - sigma[0]) * noise(0, x[0]))  # the first step is DDIM's
    for i in range(1, T):
        a, b = o_belm(*sigma[i - 1 : i + 2])
        x.append((x[i - 1] - (1 - a) * x[i] - b * noise(i, x[i])) / a)
    above, here = x[T], x[T - 1]
    for i in reversed(range(1, T)):
        a, b = o_belm(*sigma[i - 1 : i + 2])
        above, here = here, a * above + (1 - a) * here + b * noise(i, here)
    [back] = isadca.decode(model, levels[0] ** 0.5 * here)
    return back, levels[T] ** 0.5 * x[T]


def o_belm(below: float, here: float, above: float) -> tuple[float, float]:
    """a and b of x(below) = a x(above) + (1 - a) x(here) + b dx/dσ(here), which is exact for quadratics in σ."""
    down, up = here - below, above - here
    return (down / up) ** 2, -down * (down + up) / up


def steps(task: Task) -> list[tuple[str, list[float]]]:
    """Variations by the number of steps, by fixed-point iterations, and with more steps up than down."""
    model, picture = measure.shared["model"], task.picture
    refs = {f"{T} steps": isadca.invert(model, picture, T) for T in COMPARED}
    few, many = min(COMPARED), max(COMPARED)
    refs |= {f"{T} steps, one iteration": isadca.invert(model, picture, T, fixed_point=1) for T in (few, many)}
    refs[f"{many} steps up, {few} down"] = refs[f"{many} steps"].every(many // few)
    return [row for name, ref in refs.items() for row in judged(task, name, ref)]


def keep(task: Task) -> list[tuple[str, list[float]]]:
    """Three λ, each without `keep` and with it: the latents outside the object's square are then the chain's."""
    model = measure.shared["model"]
    ref = isadca.invert(model, task.picture, measure.shared["steps"])
    outside = torch.from_numpy(world.outside(task.scene)).float()
    [best] = isadca.decode(model, ref.chain[:1])
    rows = [("the reference, through the VAE", numbers(task, best, task.prompts[0]))]
    for lam in (0.5, 0.7, 1.0):
        rows += judged(task, f"λ = {lam}", ref, lam=lam)
        rows += judged(task, f"λ = {lam}, --keep", ref, lam=lam, keep=outside)
    return rows


def judged(task: Task, name: str, ref: isadca.Reference, **options) -> list[tuple[str, list[float]]]:
    """A variation for each prompt."""
    model = measure.shared["model"]
    made = isadca.vary(model, ref, task.prompts, **options)
    return [(name, numbers(task, picture, prompt)) for picture, prompt in zip(made, task.prompts)]


def numbers(task: Task, made: Image.Image, prompt: str) -> list[float]:
    """Those of COLUMNS."""
    seen = {"colour": task.scene.colour, "pattern": task.scene.pattern}
    error = np.abs(np.asarray(made, float) - np.asarray(task.picture, float))[world.outside(task.scene)].mean()
    return [*measure.judged(made, prompt, task.picture, seen), error]


# ---- tables --------------------------------------------------------------------------------------------------------

def means(found: list[tuple[str, list[float]]]) -> dict[str, np.ndarray]:
    return {name: np.mean([row for other, row in found if other == name], axis=0)
            for name in dict.fromkeys(name for name, _ in found)}


def exact_table(found) -> str:
    lines = ["| inversion (UNet calls in all) | " + " | ".join(f"T = {T}" for T in EXACT) + " |", "|---" * 4 + "|"]
    for name, row in means(found).items():
        cells = [f"{quality:.1f} dB, {spread:.2f}" for quality, spread in row.reshape(-1, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def judged_table(found) -> str:
    lines = [f"| variations | {' | '.join(COLUMNS)} |", "|---" * 6 + "|"]
    for name, (*shares, similarity, error) in means(found).items():
        lines.append(f"| {name} | {' | '.join(f'{x:.0f} %' for x in shares)} | {similarity:.2f} | {error:.1f} |")
    return "\n".join(lines)


TABLES = {"exact": (exact, exact_table), "steps": (steps, judged_table), "keep": (keep, judged_table)}


def table(name: str, pairs: int, n: int, pool) -> str:
    """A table and what it was made from; `pool` is anything with a `map`, n the steps of the table `keep`."""
    began, (one, write) = time.monotonic(), TABLES[name]
    work = tasks(pairs)
    found = [row for rows in pool.map(one, work) for row in rows]
    of = f"{len(work)} references" + (f", {pairs} pairs" if name != "exact" else "") + f", {n} steps" * (name == "keep")
    return (f"{write(found)}\n\n*`inversion.py --tables {name}`: {of}; {os.cpu_count()} cores ({platform.machine()}), "
            f"{datetime.date.today()}, {(time.monotonic() - began) / 60:.0f} minutes.*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="in all, of ten references (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of the table `keep` (%(default)s)")
    parser.add_argument("--tables", default=",".join(TABLES), help="some of %(default)s")
    parser.add_argument("--into", type=Path, help="a README: its tables are replaced")
    args = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), measure.start, ([], args.steps)) as pool:
        for name in args.tables.split(","):
            print(text := table(name, args.pairs, args.steps, pool), end="\n\n", flush=True)
            if args.into:
                measure.put(text, args.into, name)


if __name__ == "__main__":
    main()
