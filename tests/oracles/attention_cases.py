"""The variants of isadca/attention.py beside their formulas in oracle.py, and random inputs for both.

Not a test file.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from tolerances import ATTENTION as TOLERANCE

from isadca.attention import (
    Site,
    attend,
    attend_reference,
    blend,
    by_kind,
    by_rows,
    capture,
    dca,
    isa,
    where,
)
from isadca.speed.blend_isa import blend_isa

SELF = Site("up_blocks.2.attentions.1.transformer_blocks.0.attn1", "self", "up", 11, (4, 4))
CROSS = SELF._replace(name="up_blocks.2.attentions.1.transformer_blocks.0.attn2", kind="cross")

KERNELS = pytest.mark.parametrize("kernel", [attend_reference, attend], ids=["written out", "fused"])
ROWS = 4                                                      # of the batch: two guidance halves of two
EXTRA_ROWS = pytest.mark.parametrize("extra_rows", [1, 2, 4], ids=["one row", "a row per half", "all rows"])
SIZES = [(1, 1, 1, 1), (3, 5, 2, 4), (16, 16, 40, 16), (6, 77, 80, 4), (4, 77, 160, 5), (9, 2, 7, 77)]  # N, M, d, extra


class Variant(NamedTuple):
    site: Site
    build: Callable    # extra keys and values, kernel -> Attend
    formula: Callable  # q, k, v, extra keys, extra values -> y, in NumPy


def at_both(extra) -> dict:
    return {SELF.name: extra, CROSS.name: extra}


def halved(*tensors):
    return [x[:ROWS // 2] for x in tensors]


def isa_of_captured(extra, kernel):
    store = {}
    capture(store, kernel)(extra[0], *extra, SELF)
    return isa(store, kernel=kernel)


def mix_formula(q, k, v, *extra):
    return oracle.blend(oracle.attention(q, k, v), oracle.isa(q, k, v, *extra), 0.3)


def replaced_formula(q, k, v, *extra):
    return oracle.blend(oracle.attention(q, k, v), oracle.isa(q, k, v, *extra, mode="replace"), 0.3)


def by_rows_formula(q, k, v, *extra):
    first = oracle.isa(*halved(q, k, v, *extra))
    return np.concatenate([first, oracle.attention(*(x[ROWS // 2:] for x in (q, k, v)))])


def plain_formula(q, k, v, *extra):
    return oracle.attention(q, k, v)


VARIANTS = {
    "capture": Variant(SELF, lambda e, f: capture({}, f), plain_formula),
    "isa append": Variant(SELF, lambda e, f: isa(at_both(e), kernel=f), oracle.isa),
    "isa replace": Variant(SELF, lambda e, f: isa(at_both(e), "replace", f), partial(oracle.isa, mode="replace")),
    "isa of captured": Variant(SELF, isa_of_captured, oracle.isa),
    "isa at cross": Variant(CROSS, lambda e, f: isa(at_both(e), kernel=f), plain_formula),
    "dca at self": Variant(SELF, lambda e, f: dca(at_both(e), kernel=f), plain_formula),
    "dca": Variant(CROSS, lambda e, f: dca(at_both(e), kernel=f), oracle.dca),
    "dca 0.6": Variant(CROSS, lambda e, f: dca(at_both(e), 0.6, f), partial(oracle.dca, scale=0.6)),
    "blend": Variant(SELF, lambda e, f: blend(f, isa(at_both(e), kernel=f), 0.3), mix_formula),
    "blend isa": Variant(SELF, lambda e, f: blend_isa(at_both(e), 0.3, kernel=f), mix_formula),
    "blend isa replace": Variant(SELF, lambda e, f: blend_isa(at_both(e), 0.3, "replace", f), replaced_formula),
    "blend isa at cross": Variant(CROSS, lambda e, f: blend_isa(at_both(e), 0.3, kernel=f), plain_formula),
    "where": Variant(SELF, lambda e, f: where(lambda s: s.layer == 11, isa(at_both(e), kernel=f), f), oracle.isa),
    "where not": Variant(SELF, lambda e, f: where(lambda s: s.layer > 11, isa(at_both(e), kernel=f), f), plain_formula),
    "by_kind self": Variant(SELF, lambda e, f: by_kind(isa(at_both(e), kernel=f), f), oracle.isa),
    "by_kind cross": Variant(CROSS, lambda e, f: by_kind(f, dca(at_both(e), kernel=f)), oracle.dca),
    "by_rows": Variant(SELF, lambda e, f: by_rows(ROWS // 2, isa(at_both(halved(*e)), kernel=f), f), by_rows_formula),
}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def normal(*shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def drawn(size, extra_rows=1, dtype=torch.float64, heads=2):
    """q, k, v, and the extra keys and values."""
    n, m, d, m_extra = size
    shapes = [(ROWS, heads, n, d), (ROWS, heads, m, d), (ROWS, heads, m, d), *[(extra_rows, heads, m_extra, d)] * 2]
    return [normal(*shape, dtype=dtype) for shape in shapes]


def assert_is(actual: torch.Tensor, expected: np.ndarray, atol: float = TOLERANCE[torch.float64]):
    assert actual.shape == expected.shape
    error = np.abs(actual.detach().double().numpy() - expected).max()
    assert error <= atol, f"differs by {error:.1e}, allowed {atol:.0e}"  # also where error is nan


def in_numpy(tensors):
    return [x.double().numpy() for x in tensors]
