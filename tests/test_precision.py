"""The table of numerical errors in README.md: its figures are still so, and its tolerances are those that tests use."""

import re

import precision
import pytest
from precision import ATTENTION, BF16, F16, F32, HEADER, NAMES, NETWORK, PAGE, PARTS, errors, tolerance_cell

COLUMNS = {F32: 1, BF16: 2, F16: 3}


def rows() -> dict[str, list[str]]:
    text = PAGE.read_text(encoding="utf-8").split("\n".join(HEADER))[1]
    table = re.match(r"(?:\n\|.*)+", text)[0].strip()
    return {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")]
                                          for line in table.splitlines())}


def figures(part: str, dtype) -> list[float]:
    return [float(figure) for figure in rows()[part][COLUMNS[dtype]].split(", ")]


def test_the_table_has_the_tolerances_that_tests_use():
    """Tests import them from where the table reads them."""
    assert {part: cells[4:] for part, cells in rows().items()} == {
        name: [tolerance_cell(part), part.why] for name, part in PARTS.items()}


def test_errors_are_below_the_tolerances():
    """The largest error, of results of order one; of the UNet in bfloat16 the norm's."""
    for name, part in PARTS.items():
        for dtype in COLUMNS.keys() & part.tolerance.keys():
            most, rms = figures(name, dtype)
            by_norm = part.tolerance is PARTS["UNet, one pass"].tolerance and dtype == BF16
            if dtype == F32 or part.tolerance is ATTENTION or by_norm:
                assert (rms if by_norm else most) < part.tolerance[dtype], (name, NAMES[dtype])
    assert NETWORK[F32] == 1e-5


@pytest.mark.parametrize("measure, dtype", [(precision.attention, F32), (precision.attention, BF16),
                                            (precision.attention, F16), (precision.text, F32), (precision.image, F32)])
def test_the_figures_are_still_so(measure, dtype):
    """Within a factor of three: another processor adds in another order."""
    for part, found in errors(measure, dtype).items():
        for error, written in zip(found, figures(part, dtype)):
            assert written / 3 < error < 3 * written, (part, NAMES[dtype], error, written)
