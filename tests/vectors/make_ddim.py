"""Vectors of the noise schedule and of DDIM both ways, in NumPy float64 from the formulas."""

import math
from functools import lru_cache

import numpy as np

from cases import ERROR, Case

EXACT = 1e-12


@lru_cache
def levels(kind="scaled_linear", n=1000, first=0.00085, last=0.012):
    """alpha_bar at each training step, one factor after the other."""
    table, product = [], 1.0
    for i in range(n):
        if kind == "linear":
            beta = first + (last - first) * i / (n - 1)
        else:
            beta = (math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * i / (n - 1)) ** 2
        product *= 1 - beta
        table.append(product)
    return np.array(table)


def grid(n, offset, train_steps=1000):
    stride = train_steps // n
    return np.array([(i * stride + offset, (i - 1) * stride + offset) for i in range(n)][::-1])


def level_at(t, to_one=False):
    return (1.0 if to_one else levels()[0]) if t < 0 else levels()[t]


def move(z, eps, a, b):
    """From level a to level b in the direction of eps."""
    return math.sqrt(b) * (z - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps


def walk(z, eps, steps):
    path = [z]
    for e, (a, b) in zip(eps, steps):
        path.append(move(path[-1], e, a, b))
    return np.stack(path)


def schedule_cases(rng):
    settings = dict(beta_start=0.00085, beta_end=0.012)
    for kind, other in (("scaled_linear", "linear"), ("linear", "scaled_linear")):
        yield Case("alpha_bars", kind, dict(kind=kind, train_steps=1000, **settings), levels(kind), EXACT, {
            f"the betas are {other}": levels(other), "the levels are single alphas, not their product":
            np.append(levels(kind)[:1], levels(kind)[1:] / levels(kind)[:-1])})
    t = np.array([981, 1, 0, -1, -19])
    for to_one in (False, True):
        yield Case("level", f"the end is {'1' if to_one else 'alpha_bar[0]'}", dict(t=t, alpha_to_one=to_one),
                   np.array([level_at(x, to_one) for x in t]), EXACT, {
            f"the last step ends at {'alpha_bar[0]' if to_one else 'level 1'}":
            np.array([level_at(x, not to_one) for x in t]),
            "negative steps count from the end of the table": levels()[t]})
    for n, offset in ((50, 1), (30, 1), (7, 0), (1, 1), (250, 1)):
        stride = 1000 // n
        spread = np.round(np.linspace(0, 999, n)).astype(int)[::-1] if n > 1 else np.array([999])
        yield Case("timesteps", f"{n} from {offset}", dict(n=n, offset=offset), grid(n, offset), 0, {
            "the offset is forgotten" if offset else "there is an offset of 1": grid(n, 1 - offset),
            "the steps are spread from 999 to 0": np.stack([spread, spread - stride], axis=1)})
    yield Case("timesteps", "none at all", dict(n=0, offset=1), ERROR, 0, {
        "zero steps give an empty loop, not an error": np.empty((0, 2))})


def ddim_cases(rng):
    z, eps = rng.standard_normal((2, 2, 4, 3, 5))
    for t, below in ((981, 961), (501, 481), (1, -19)):
        a, b = level_at(t), level_at(below)
        clean = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if below > 0:
            yield Case("add_noise", f"to {t}", dict(x0=z, eps=eps, alpha_bar=a), math.sqrt(a) * z
                       + math.sqrt(1 - a) * eps, EXACT, {"the levels' roots are missing": a * z + (1 - a) * eps})
            yield Case("predict_x0", f"at {t}", dict(z=z, eps=eps, alpha_bar=a), clean, 1e-11)
        yield Case("ddim_step", f"{t} to {below}", dict(z=z, eps=eps, alpha_bar=a, alpha_bar_prev=b),
                   move(z, eps, a, b), 1e-11, {
            "Eq. 3 to the letter: it jumps to the clean latent": clean,
            "Eq. 3 to the letter, with the alpha of one step": literal_step(z, eps, a, b)})
        yield Case("ddim_inverse_step", f"{below} to {t}", dict(z=z, eps=eps, alpha_bar_prev=b, alpha_bar=a),
                   move(z, eps, b, a), EXACT, {
            "Eq. 4 to the letter: its noise has the other level's factor": math.sqrt(b) * (
                z - math.sqrt(1 - b) * eps) / math.sqrt(b) + math.sqrt(1 - a) * eps,
            "the two levels are swapped": move(z, eps, a, b)})
    for n, offset, to_one in ((4, 1, False), (4, 1, True), (7, 0, False), (3, 1, False)):
        yield from whole_walks(rng, n, offset, to_one)


def literal_step(z, eps, a, b):
    alpha = a / b
    return (z - (1 - alpha) / math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)


def whole_walks(rng, n, offset, to_one):
    """Down and up a whole grid, with given noise at each step."""
    z, eps = rng.standard_normal((1, 4, 2, 3)), rng.standard_normal((n, 1, 4, 2, 3))
    pairs = [(level_at(t, to_one), level_at(below, to_one)) for t, below in grid(n, offset)]
    other = [(level_at(t, not to_one), level_at(below, not to_one)) for t, below in grid(n, offset)]
    what = f"the {{}} at {'alpha_bar[0], not at level 1' if to_one else 'level 1, not at alpha_bar[0]'}"
    name = f"{n} steps from {offset}, end level {'1' if to_one else 'alpha_bar[0]'}"
    arguments = dict(z=z, eps=eps, offset=offset, alpha_to_one=to_one)
    yield Case("ddim_sample", name, arguments, walk(z, eps, pairs), 1e-10, {
        what.format("last step ends"): walk(z, eps, other),
        "the noise of the steps is in reverse order": walk(z, eps[::-1], pairs)})
    up, other_up = ([(b, a) for a, b in reversed(way)] for way in (pairs, other))
    yield Case("ddim_invert", name, arguments, walk(z, eps, up), 1e-10, {
        what.format("first step starts"): walk(z, eps, other_up),
        "the noise of the steps is in reverse order": walk(z, eps[::-1], up)})


def sinusoids(t, dim, over=0):
    """The time step's embedding in float64; `over` is what some conventions take from the exponent's denominator."""
    angles = np.asarray(t)[:, None] * np.exp(-math.log(10000) * np.arange(dim // 2) / (dim // 2 - over))
    return np.cos(angles), np.sin(angles)


def embedding_cases(rng):
    for dim, t in ((8, [0, 1, 500, 981]), (320, [1, 981])):
        cos, sin = sinusoids(t, dim)
        yield Case("timestep_embedding", f"{dim} wide", dict(t=np.array(t), dim=dim), np.hstack([cos, sin]), 2e-4, {
            "sines come before cosines": np.hstack([sin, cos]),
            "the exponent is over dim/2 - 1": np.hstack(sinusoids(t, dim, 1))})


def cases():
    rng = np.random.default_rng(21)
    return [case for make in (schedule_cases, ddim_cases, embedding_cases) for case in make(rng)]
