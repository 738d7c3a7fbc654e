"""The gallery's files as modules, and random inputs for them, in float64: N = 2 variations in two guidance halves,
2 heads, a grid of 4 x 4 cells, a text of 7 tokens."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import torch
from conftest import ROOT

import isadca
from isadca.attention import Site

FOLDER = ROOT / "examples" / "methods"
SCRIPTS = ("measure", "claims", "inversion")
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SCRIPTS)
NAMES = [path.stem for path in FILES]
N, HEADS, GRID, TOKENS, WIDTH = 2, 2, (4, 4), 7, 5
UP = Site("up_blocks.1.attentions.0.transformer_blocks.0.attn1", "self", "up", 9, GRID)
MID = UP._replace(name="mid_block.attentions.0.transformer_blocks.0.attn1", place="mid", layer=6)
CROSS = UP._replace(name="up_blocks.1.attentions.0.transformer_blocks.0.attn2", kind="cross")
HALVES = ["unconditional", "text"]  # in place of their keys and values


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def method_of(module) -> isadca.Method:
    [(name, method)] = [(k, v) for k, v in vars(module).items() if isinstance(v, isadca.Method)]
    assert name == module.__name__.upper()
    return method


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def drawn(site=UP, rows=2 * N):
    cells, tokens = GRID[0] * GRID[1], TOKENS if site.kind == "cross" else GRID[0] * GRID[1]
    return normal(rows, HEADS, cells, WIDTH), normal(rows, HEADS, tokens, WIDTH), normal(rows, HEADS, tokens, WIDTH)


def controls(module, **changes):
    """The fields of isadca.Controls that the gallery reads; a reference of one row."""
    fields = dict(z=normal(N, 4, 8, 8), t=700, i=3, steps=10, n=N, halves=2, ref_kv={UP.name: drawn(rows=1)[1:]},
                  ref_qk={}, ip_kv={CROSS.name: (normal(2, HEADS, 3, WIDTH), normal(2, HEADS, 3, WIDTH))},
                  method=method_of(module), kernel=isadca.attend,
                  conditions=SimpleNamespace(text_kv=HALVES, words=[("a", [1]), ("lemon", [2, 3])], kept={}))
    return SimpleNamespace(**fields | changes)


def is_close(ours, theirs):
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-10)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def probs(q, k):
    return softmax(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]))


def numpy(*tensors):
    return [x.numpy() for x in tensors]
