"""What evaluate.py wrote, as a reader wants it: results.csv, table.md in the form of the paper's Table 1, and grids in
that of its Fig. 3 and Fig. 4."""

import csv
import datetime
import io
import platform
from pathlib import Path
from statistics import mean, median, stdev

import torch
from PIL import Image

from ..common.files import save_text
from ..common.images import load_image, save_png
from ..common.sheets import contact_sheet
from ..loading.load import default_weights
from ..networks.model import Model
from .evaluate import Item
from .scores import METRICS

LABELS = {"rival": "RIVAL", "ip-adapter": "IP-Adapter", "image-variations": "SD image-variations",
          "controlnet-shuffle": "ControlNet Shuffle", "isadca": "Ours, λ = 0.7", "isadca-0.5": "Ours, λ = 0.5",
          "isadca-attention": "Ours, attention mix", "isadca-prior": "Ours, with prior"}
PAPER = {"rival": (0.4488, 0.5851, 0.0133, 0.8772), "ip-adapter": (0.5329, 0.2390, 0.0228, 0.7526),
         "image-variations": (0.6401, 0.5248, 0.0212, 0.8545), "controlnet-shuffle": (0.5410, 0.5458, 0.0307, 0.8029),
         "isadca": (0.5413, 0.5740, 0.0150, 0.8822)}  # its Table 1: LPIPS, SSIM, SIFID, CLIP similarity
SHOWN = 8  # pairs in a grid
Numbers = dict[Item, dict[str, float]]


def write_report(items: list[Item], results: Path, metrics: tuple[str, ...], about: str) -> list[Path]:
    """Everything that the folder's numbers tell, written into it; `about` stands under the table. -> the files."""
    numbers = {item: item.numbers(results) for item in items}
    paths = [results / name for name in ("results.csv", "table.md", "fig3.png", "fig4.png")]
    systems = list(dict.fromkeys(item.system for item in items))
    save_text(to_csv(numbers, metrics), paths[0])
    save_text(f"{to_markdown(numbers, systems, metrics)}\n{overhead(numbers)}\n\n{about}\n", paths[1])
    save_png(comparison(items, systems, results), paths[2])
    ablation = [name for name in ("isadca-0.5", "isadca", "isadca-prior") if name in systems]
    if not ablation:
        return paths[:3]
    save_png(ablation_grid(items, ablation, results), paths[3])
    return paths


def about_run(items: list[Item], model: Model, steps: int, weights: Path, command: str) -> str:
    """What the table was made from, where and when; and whether it may be held against the paper's."""
    world = ("**Figures of the demo world** (64 × 64 pictures of emoji, a small model, and small metric networks that "
             "were trained in that world): they say nothing about Stable Diffusion 1.5, and only their order can be "
             "looked at beside the paper's. " if weights == default_weights() else "")
    device = (torch.cuda.get_device_name(model.device) if model.device.type == "cuda"
              else f"{torch.get_num_threads()} threads ({platform.machine()})")
    pairs, seeds = (len({getattr(item, field) for item in items}) for field in ("index", "seed"))
    return (f"{world}{pairs} pairs, {seeds} seed{'s' * (seeds > 1)}, {steps} steps, {model.size} × {model.size}, "
            f"weights {weights.name} in {str(model.dtype).removeprefix('torch.')}; mean ± standard error over pairs. "
            f"`{command}`, {device}, torch {torch.__version__}, {datetime.date.today()}.")


def to_csv(numbers: Numbers, metrics: tuple[str, ...]) -> str:
    """A line a variation."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["pair", "reference", "prompt", "system", "seed", *metrics, "seconds"])
    for item, found in numbers.items():
        values = [f"{found[key]:.6g}" for key in (*metrics, "seconds")]
        table.writerow([item.index, item.pair.reference.name, item.pair.prompt, item.system, item.seed, *values])
    return out.getvalue()


def to_markdown(numbers: Numbers, systems: list[str], metrics: tuple[str, ...]) -> str:
    """Mean ± standard error over pairs, the best of a column in bold; then the paper's row."""
    columns = {metric: {system: over_pairs(numbers, system, metric) for system in systems} for metric in metrics}
    best = {metric: (max if METRICS[metric][1] else min)(column, key=lambda s: column[s][0])
            for metric, column in columns.items()}
    heads = [f"{METRICS[metric][0]} {'↑' if METRICS[metric][1] else '↓'}" for metric in metrics]
    heads += ["s / picture", "paper: LPIPS ↓", "SSIM ↑", "SIFID ↓", "CLIP sim. ↑"]
    lines = ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for system in systems:
        cells = []
        for metric in metrics:
            middle, error = columns[metric][system]
            text = f"{middle:.4f}" if metric == "sifid" else f"{middle:.3f}"
            text = f"**{text}**" if best[metric] == system else text
            cells.append(text + (f" ± {error:.{4 if metric == 'sifid' else 3}f}" if error is not None else ""))
        cells.append(f"{seconds(numbers, system):.2f}")
        cells += [f"{x:.4f}" for x in PAPER.get(system, ())] or ["", "", "", ""]
        lines.append(f"| {LABELS.get(system, system)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def over_pairs(numbers: Numbers, system: str, metric: str) -> tuple[float, float | None]:
    """Mean and its standard error, a pair being one sample whatever its seeds; no error from a single pair."""
    by_pair: dict[int, list[float]] = {}
    for item, found in numbers.items():
        if item.system == system:
            by_pair.setdefault(item.index, []).append(found[metric])
    means = [mean(values) for values in by_pair.values()]
    return mean(means), stdev(means) / len(means) ** 0.5 if len(means) > 1 else None


def seconds(numbers: Numbers, system: str) -> float:
    """The median over pictures: from the reference as a file to the variation, inversion included."""
    return median(found["seconds"] for item, found in numbers.items() if item.system == system)


def overhead(numbers: Numbers) -> str:
    """The comparison of the paper's section IV-D."""
    systems = {item.system for item in numbers}
    if "rival" not in systems or not systems & {"isadca", "isadca-attention"}:
        return ""
    base = seconds(numbers, "rival")
    parts = [f"{LABELS[name]} {seconds(numbers, name):.2f} s ({100 * (seconds(numbers, name) / base - 1):+.1f} %)"
             for name in ("isadca-attention", "isadca") if name in systems]
    return (f"Time for a picture, inversion included, against RIVAL's {base:.2f} s: {', '.join(parts)}. The paper has "
            "8.6096 s against 8.3894 s (+2.63 %).")


def comparison(items: list[Item], systems: list[str], results: Path) -> Image.Image:
    """Fig. 3: a row a pair, different references first; the reference, then every system."""
    made = {(item.index, item.system): item for item in reversed(items)}  # the first seed stays
    rows = []
    for item in spread(items):
        paths = [made[item.index, system].picture(results) for system in systems]
        rows.append([load_image(path) for path in (paths[0].with_name("reference.png"), *paths)])
    headings = [plain(LABELS.get(system, system)) for system in systems]
    return contact_sheet(rows, ["reference", *headings], [item.pair.prompt for item in spread(items)])


def ablation_grid(items: list[Item], systems: list[str], results: Path) -> Image.Image:
    """Fig. 4: a column a pair; the references, then λ = 0.5, λ = 0.7, and the prior."""
    made = {(item.index, item.system): item for item in reversed(items)}
    shown = spread(items)
    rows = [[load_image(made[item.index, systems[0]].picture(results).with_name("reference.png")) for item in shown]]
    rows += [[load_image(made[item.index, system].picture(results)) for item in shown] for system in systems]
    return contact_sheet(rows, [item.pair.prompt for item in shown],
                         ["reference", *(plain(LABELS[system]) for system in systems)])


def spread(items: list[Item]) -> list[Item]:
    """One item of each pair to show: the first of every reference, then more."""
    firsts = list({item.index: item for item in reversed(items)}.values())[::-1]
    by_reference = {item.pair.reference: item for item in reversed(firsts)}
    chosen = list(by_reference.values())[::-1][:SHOWN]
    rest = [item for item in firsts if item not in chosen]
    return (chosen + rest)[:SHOWN]


def plain(label: str) -> str:
    """The sheets' font has no Greek letters."""
    return label.replace("λ", "lambda")
