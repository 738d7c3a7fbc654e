"""Vectors of the single equations, in NumPy float64 from the formulas: attention, ISA, DCA, λ, guidance, AdaIN,
shuffle. Only what random numbers a seed means comes from torch, since that is part of the convention."""

import math

import numpy as np
import torch

from cases import Case

EXACT = 1e-12


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attend(q, k, v, masked=-np.inf, causal=False, scale=None):
    """Eq. 6. `masked` is what a causal mask adds to the scores of later keys; minus infinity is right."""
    scores = np.einsum("bhnd,bhmd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = np.arange(k.shape[2])[None, :] > np.arange(q.shape[2])[:, None]
        scores = np.where(later, scores + masked, scores) if np.isfinite(masked) else np.where(later, masked, scores)
    return np.einsum("bhnm,bhmd->bhnd", softmax(scores), v)


def rows_of(x, rows):
    """Row r of the extra tensors serves rows/R neighbouring rows of the batch."""
    return np.repeat(x, rows // len(x), axis=0)


def join(*parts):
    return np.concatenate(parts, axis=2)


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # (B,N,H·d) -> (B,H,N,d)


def merge(x):
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


# ---- attention -------------------------------------------------------------------------------------------------

def attention_cases(rng):
    q, k, v = (rng.standard_normal(s) for s in ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)))
    yield Case("attention", "more keys than queries", dict(q=q, k=k, v=v), attend(q, k, v), EXACT, {
        "the scores are not divided by the root of the head's width": attend(q, k, v, scale=1.0),
        "the scores are divided by the head's width, not by its root": attend(q, k, v, scale=1 / 4)})
    yield Case("attention", "scores of some hundreds", dict(q=40 * q, k=40 * k, v=v), attend(40 * q, 40 * k, v), 1e-9)
    k, v = k[:, :, :5], v[:, :, :5]
    yield Case("attention", "causal", dict(q=q, k=k, v=v, causal=True), attend(q, k, v, causal=True), EXACT, {
        "the causal mask is missing": attend(q, k, v)})
    q, k = 1e5 * np.abs(q), -1e5 * np.abs(k)  # every score is far below a mask of -1e9
    yield Case("attention", "causal, scores of minus billions", dict(q=q, k=k, v=v, causal=True),
               attend(q, k, v, causal=True), 1e-9, {
        "the causal mask is a finite number, added": attend(q, k, v, -1e9, True)})


def isa_cases(rng):
    q, k, v = (rng.standard_normal((4, 2, 6, 4)) for _ in range(3))
    for name, rows in (("one reference row", 1), ("a reference row for each guidance half", 2), ("a row each", 4)):
        k_ref, v_ref = (rng.standard_normal((rows, 2, 5, 4)) for _ in range(2))
        K, V = rows_of(k_ref, 4), rows_of(v_ref, 4)
        for mode in ("append", "replace"):
            right, wrong = attend(q, join(K, k), join(V, v)), attend(q, K, V)
            if mode == "replace":
                right, wrong = wrong, right
            mistakes = {"the reference is left out": attend(q, k, v), ("the reference stands in place of the own tokens"
                        if mode == "append" else "the own tokens are kept beside the reference's"): wrong}
            if rows == 2:
                K2, V2 = np.tile(k_ref, (2, 1, 1, 1)), np.tile(v_ref, (2, 1, 1, 1))
                mistakes["the reference's rows alternate; each has to serve neighbours"] = (
                    attend(q, join(K2, k), join(V2, v)) if mode == "append" else attend(q, K2, V2))
            arguments = dict(q=q, k=k, v=v, k_ref=k_ref, v_ref=v_ref, mode=mode)
            yield Case("isa", f"{mode}, {name}", arguments, right, EXACT, mistakes)
    x, x_ref = rng.standard_normal((2, 6, 8)), rng.standard_normal((2, 6, 8))
    w_q, w_k, w_v = (rng.standard_normal((8, 8)) for _ in range(3))
    both = np.concatenate([x_ref, x], axis=1)
    q, k, v = (split(y, 2) for y in (x @ w_q.T, both @ w_k.T, both @ w_v.T))
    yield Case("isa_layer", "from hidden states", dict(x=x, x_ref=x_ref, w_q=w_q, w_k=w_k, w_v=w_v, heads=2),
               merge(attend(q, k, v)), EXACT, {
        "the queries come from the reference": merge(attend(split(x_ref @ w_q.T, 2), k, v)),
        "heads is taken as the width of a head": merge(attend(*(split(y, 4) for y in (
            x @ w_q.T, both @ w_k.T, both @ w_v.T))))})


def dca_cases(rng):
    q = rng.standard_normal((4, 2, 6, 4))
    k, v = (rng.standard_normal((4, 2, 7, 4)) for _ in range(2))
    for family, tokens, scale in (("base, 4 tokens", 4, 1.0), ("plus, 16 tokens", 16, 0.6),
                                  ("full-face, 257 tokens", 257, 1.0)):
        k_ip, v_ip = (rng.standard_normal((2, 2, tokens, 4)) for _ in range(2))
        K, V = rows_of(k_ip, 4), rows_of(v_ip, 4)
        mistakes = {"the image is left out": attend(q, k, v),
                    "text and image share one softmax": attend(q, join(k, K), join(v, V))}
        if scale != 1:
            mistakes["the scale is in the scores, not on the output"] = attend(q, k, v) + attend(q, scale * K, V)
        yield Case("dca", family, dict(q=q, k=k, v=v, k_ip=k_ip, v_ip=v_ip, scale=scale),
                   attend(q, k, v) + scale * attend(q, K, V), EXACT, mistakes)
    x, text, image = (rng.standard_normal(s) for s in ((2, 6, 8), (2, 7, 5), (2, 4, 5)))
    w = dict(w_q=(8, 8), w_k=(8, 5), w_v=(8, 5), w_k_ip=(8, 5), w_v_ip=(8, 5))
    w = {name: rng.standard_normal(shape) for name, shape in w.items()}
    q, k, v, k_ip, v_ip = (split(y @ w[name].T, 2) for y, name in zip((x, text, text, image, image), w))
    text_again = (split(image @ w[name].T, 2) for name in ("w_k", "w_v"))
    yield Case("dca_layer", "from hidden states", dict(x=x, text=text, image=image, heads=2, **w),
               merge(attend(q, k, v) + attend(q, k_ip, v_ip)), EXACT, {
        "the image goes through the text's matrices": merge(attend(q, k, v) + attend(q, *text_again))})


def lambda_cases(rng):
    a, b = rng.standard_normal((2, 2, 4, 3, 5))
    for lam in (0.0, 0.3, 1.0):
        yield Case("mix_noise", f"lambda {lam}", dict(eps_isa=a, eps_dca=b, lam=lam), lam * a + (1 - lam) * b, EXACT,
                   {"lambda is the wrong way round": lam * b + (1 - lam) * a})
    q, k, v, k_ref, v_ref = rng.standard_normal((5, 2, 2, 6, 4))
    k_text, v_text, k_ip, v_ip = rng.standard_normal((4, 2, 2, 3, 4))
    own, text, image = attend(q, k, v), attend(q, k_text, v_text), attend(q, k_ip, v_ip)
    for lam in (0.0, 0.3, 1.0):
        for mode, isa in (("append", attend(q, join(k_ref, k), join(v_ref, v))), ("replace", attend(q, k_ref, v_ref))):
            yield Case("mix_self", f"{mode}, lambda {lam}",
                       dict(q=q, k=k, v=v, k_ref=k_ref, v_ref=v_ref, lam=lam, mode=mode),
                       (1 - lam) * own + lam * isa, EXACT,
                       {"lambda is the wrong way round": lam * own + (1 - lam) * isa})
        yield Case("mix_cross", f"lambda {lam}", dict(
            q=q, k=k_text, v=v_text, k_ip=k_ip, v_ip=v_ip, lam=lam, scale=0.8), text + (1 - lam) * 0.8 * image, EXACT,
                   {"lambda is the wrong way round": text + lam * 0.8 * image}
                   | ({"the text is weighted, too": (1 - lam) * (text + 0.8 * image)} if lam else {}))
    t = np.array([981, 500, 250, 1])
    straight, wave = t / 1000, (1 - np.cos(np.pi * t / 1000)) / 2
    for name, lam, share in (("constant", 0.7, None), ("linear", {"linear": [0.9, 0.2]}, straight),
                             ("cosine", {"cosine": [1.0, 0.0]}, wave)):
        first, last = (0.7, 0.7) if share is None else next(iter(lam.values()))
        share = straight if share is None else share
        backwards = {} if name == "constant" else {"the schedule runs backwards": first + (last - first) * share}
        yield Case("lambda_at", name, dict(lam=lam, t=t, T=1000), last + (first - last) * share, EXACT, backwards)


def noise_cases(rng):
    u, c = rng.standard_normal((2, 2, 4, 3, 5))
    for m in (7.0, 1.0, 0.0):
        yield Case("guide", f"m {m}", dict(eps_u=u, eps_c=c, m=m), u + m * (c - u), EXACT, {
            "m is counted from the conditional side": c + m * (c - u),
            "unconditional and conditional are swapped": c + m * (u - c)})
    x, ref = 3 + 2 * rng.standard_normal((2, 4, 3, 5)), rng.standard_normal((1, 4, 3, 5))

    def moments(y, ddof=1, eps=1e-5, axes=(2, 3)):
        return y.mean(axes, keepdims=True), np.sqrt(y.var(axes, ddof=ddof, keepdims=True) + eps)

    def align(**options):
        (mean, std), (ref_mean, ref_std) = moments(x, **options), moments(ref, **options)
        return (x - mean) / std * ref_std + ref_mean
    yield Case("adain", "per row and channel", dict(x=x, ref=ref), align(), EXACT, {
        "the variance is divided by n, not by n - 1": align(ddof=0),
        "the 1e-5 inside the root is missing": align(eps=0.0),
        "all channels share one mean and deviation": align(axes=(1, 2, 3))})
    for seed in (0, 5):
        z = rng.standard_normal((1, 4, 3, 5))
        order = torch.randperm(15, generator=torch.Generator().manual_seed(seed)).numpy()
        flat, scattered = z.reshape(4, 15), np.empty((4, 15))
        scattered[:, order] = flat
        yield Case("shuffle", f"seed {seed}", dict(z=z, order=order, seed=seed), flat[:, order].reshape(z.shape),
                   EXACT, {"cell i went to order[i], it has to come from there": scattered.reshape(z.shape),
                           "the cells are numbered column by column": columnwise(z, order)})
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    z = 2 + 3 * z
    mean, std = z.mean((2, 3), keepdims=True), z.std((2, 3), ddof=1, keepdims=True)
    yield Case("match_moments", "per channel", dict(z=z, noise=noise, seed=5), mean + std * noise, EXACT, {
        "the variance is divided by n, not by n - 1": mean + z.std((2, 3), keepdims=True) * noise,
        "all channels share one mean and deviation": z.mean() + z.std(ddof=1) * noise})
    yield Case("renew", "a third", dict(z=z, noise=noise, d=1 / 3, seed=5),
               math.sqrt(2 / 3) * z + math.sqrt(1 / 3) * noise, EXACT,
               {"the weights are not the roots: the variance shrinks": 2 / 3 * z + 1 / 3 * noise})


def columnwise(z, order):
    flipped = z.swapaxes(2, 3).reshape(4, 15)[:, order]
    return flipped.reshape(1, 4, 5, 3).swapaxes(2, 3).copy()


def cases():
    rng = np.random.default_rng(20)
    return [case for make in (attention_cases, isa_cases, dca_cases, lambda_cases, noise_cases) for case in make(rng)]
