"""The grids of pictures in the form of the paper's Fig. 3 (systems) and Fig. 4 (λ and the prior)."""

from pathlib import Path

from PIL import Image

from ..common.images import load_image
from ..common.sheets import contact_sheet
from .results_folder import Item
from .systems import System

SHOWN = 8  # pairs in a grid
FIG_4 = ("isadca-0.5", "isadca", "isadca-prior")


def grid(items: list[Item], systems: list[System], results: Path, upright: bool = False) -> Image.Image:
    """Fig. 3: a row a pair, the reference and then every system. `upright`, Fig. 4: a column a pair."""
    made = {(item.index, item.system): item for item in reversed(items)}  # the first seed stays
    shown = spread(items)
    rows = []
    for item in shown:
        paths = [made[item.index, system].picture(results) for system in systems]
        rows.append([load_image(path) for path in (paths[0].with_name("reference.png"), *paths)])
    headings = ["reference", *(system.label.replace("λ", "lambda") for system in systems)]  # the font has no Greek
    prompts = [item.pair.prompt for item in shown]
    columns = list(map(list, zip(*rows)))
    return contact_sheet(columns, prompts, headings) if upright else contact_sheet(rows, headings, prompts)


def spread(items: list[Item]) -> list[Item]:
    """One item of each pair to show: the first of every reference, then more."""
    firsts = list({item.index: item for item in reversed(items)}.values())[::-1]
    of_reference = {item.pair.reference: item for item in reversed(firsts)}
    return sorted(firsts, key=lambda item: of_reference[item.pair.reference] is not item)[:SHOWN]
