"""results.csv: a line a variation."""

import csv
import io

from .results_folder import Numbers


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
