"""What a run leaves to be read: results.csv, a line a variation; table.md, in the form of the paper's Table 1; grids of
pictures, in the form of its Figs. 3 and 4."""

import csv
import datetime
import io
import platform
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import torch
from PIL import Image

from ..common.files import save_png, save_text
from ..common.images import load_image
from ..common.sheets import contact_sheet
from ..loading.load import default_weights
from ..networks.model import Model
from .judge import METRICS
from .results_folder import Item, Numbers
from .systems import System

SHOWN = 8  # pairs in a grid
FIG_4 = ("isadca-0.5", "isadca", "isadca-prior")


class Results(NamedTuple):
    files: list[Path]  # results.csv, table.md and the grids; under torchrun only the first process has them
    numbers: Numbers


def write_results(items: list[Item], metrics: tuple[str, ...], out: Path, about: str) -> Results:
    """The table and the grids of what the folder holds; `about` stands under the table."""
    numbers = {item: item.numbers(out) for item in items}
    systems = list(dict.fromkeys(item.system for item in items))
    files = [out / name for name in ("results.csv", "table.md", "fig3.png")]
    table = f"{to_markdown(numbers, metrics)}\n{overhead(numbers)}\n\n{about}\n"
    for text, path in zip((to_csv(numbers, metrics), table), files):
        save_text(text.encode(errors="backslashreplace").decode(), path)  # a path may hold bytes that are not text
    save_png(grid(items, systems, out), files[2])
    ablation = [system for name in FIG_4 for system in systems if system.name == name]
    if ablation:
        files.append(out / "fig4.png")
        save_png(grid(items, ablation, out, pairs_as_columns=True), files[3])
    return Results(files, numbers)


# ---- results.csv -------------------------------------------------------------------------------------------------

def to_csv(numbers: Numbers, metrics: tuple[str, ...]) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["pair", "reference", "prompt", "system", "seed", *metrics, "seconds"])
    for item, found in numbers.items():
        words = map(as_text, (item.pair.reference.name, item.pair.prompt, item.system.name))
        table.writerow([item.index, *words, item.seed, *(f"{found[key]:.6g}" for key in (*metrics, "seconds"))])
    return out.getvalue()


def as_text(cell: str) -> str:
    """With a quote before what a spreadsheet would take for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


# ---- table.md ----------------------------------------------------------------------------------------------------

def to_markdown(numbers: Numbers, metrics: tuple[str, ...]) -> str:
    """Mean ± standard error over pairs, the best of a column in bold; at the right, the paper's figures."""
    systems = list(dict.fromkeys(item.system for item in numbers))
    columns = {metric: {system: over_pairs(numbers, system, metric) for system in systems} for metric in metrics}
    best = {metric: (max if METRICS[metric][1] else min)(column, key=lambda s: column[s][0])
            for metric, column in columns.items()}
    heads = [f"{METRICS[metric][0]} {'↑' if METRICS[metric][1] else '↓'}" for metric in metrics]
    heads += ["s / picture", "paper: LPIPS ↓", "SSIM ↑", "SIFID ↓", "CLIP sim. ↑"]
    lines = ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for system in systems:
        cells = [_cell(*columns[metric][system], 4 if metric == "sifid" else 3, best[metric] is system)
                 for metric in metrics]
        cells.append(f"{seconds(numbers, system):.2f}")
        cells += [f"{x:.4f}" for x in system.paper] or ["", "", "", ""]
        lines.append(f"| {system.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(middle: float, error: float | None, digits: int, best: bool) -> str:
    text = f"**{middle:.{digits}f}**" if best else f"{middle:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def over_pairs(numbers: Numbers, system: System, metric: str) -> tuple[float, float | None]:
    """Mean over pairs and its standard error. A pair's seeds are averaged first; a single pair gives no error."""
    by_pair: dict[int, list[float]] = {}
    for item, found in numbers.items():
        if item.system == system:
            by_pair.setdefault(item.index, []).append(found[metric])
    means = [mean(values) for values in by_pair.values()]
    return mean(means), stdev(means) / len(means) ** 0.5 if len(means) > 1 else None


def seconds(numbers: Numbers, system: System) -> float:
    """The median over pictures: from the reference as a file to the variation, inversion included."""
    return median(found["seconds"] for item, found in numbers.items() if item.system == system)


def overhead(numbers: Numbers) -> str:
    """The comparison of the paper's section IV-D."""
    systems = {item.system.name: item.system for item in numbers}
    ours = [systems[name] for name in ("isadca-attention", "isadca") if name in systems]
    if "rival" not in systems or not ours:
        return ""
    base = seconds(numbers, systems["rival"])
    times = [(system.label, seconds(numbers, system)) for system in ours]
    parts = [f"{label} {time:.2f} s ({100 * (time / base - 1):+.1f} %)" for label, time in times]
    return (f"Time for a picture, inversion included, against RIVAL's {base:.2f} s: {', '.join(parts)}. The paper has "
            "8.6096 s against 8.3894 s (+2.63 %).")


def about_run(items: list[Item], model: Model, steps: int | None, weights: Path) -> str:
    """What the table was made from, where and when; and whether it may be compared with the paper's."""
    world = ("**Figures of the demo world** (64 × 64 pictures of emoji, a small model, and small metric networks that "
             "were trained in that world): they say nothing about Stable Diffusion 1.5, and only their order can be "
             "looked at beside the paper's. " if weights == default_weights() else "")
    plural = lambda n, word: f"{n} {word}{'s' * (n != 1)}"
    device = (torch.cuda.get_device_name(model.device) if model.device.type == "cuda"
              else f"{plural(torch.get_num_threads(), 'thread')} ({platform.machine()})")
    pairs, seeds = {item.index for item in items}, {item.seed for item in items}
    strides = plural(steps, "step") if steps else "each system at its own steps"
    return (f"{world}{plural(len(pairs), 'pair')}, {plural(len(seeds), 'seed')}, {strides}, "
            f"{model.size} × {model.size}, weights {weights.name} in {str(model.dtype).removeprefix('torch.')}; "
            f"mean ± standard error over pairs. {device}, torch {torch.__version__}, {datetime.date.today()}.")


# ---- grids -------------------------------------------------------------------------------------------------------

def grid(items: list[Item], systems: list[System], results: Path, pairs_as_columns: bool = False) -> Image.Image:
    """Fig. 3: a row a pair, the reference and then every system. `pairs_as_columns`: Fig. 4."""
    made = {(item.index, item.system): item for item in reversed(items)}  # the first seed stays
    shown = spread(items)
    rows = []
    for item in shown:
        paths = [made[item.index, system].picture(results) for system in systems]
        rows.append([load_image(path) for path in (paths[0].with_name("reference.png"), *paths)])
    headings = ["reference", *(system.label.replace("λ", "lambda") for system in systems)]  # the font has no Greek
    prompts = [item.pair.prompt for item in shown]
    columns = list(map(list, zip(*rows)))
    return contact_sheet(columns, prompts, headings) if pairs_as_columns else contact_sheet(rows, headings, prompts)


def spread(items: list[Item]) -> list[Item]:
    """One item of each pair to show: the first of every reference, then more."""
    firsts = list({item.index: item for item in reversed(items)}.values())[::-1]
    of_reference = {item.pair.reference: item for item in reversed(firsts)}
    return sorted(firsts, key=lambda item: of_reference[item.pair.reference] is not item)[:SHOWN]
