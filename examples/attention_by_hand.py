"""The paper's attention by hand: each kernel in NumPy beside ours, on arrays small enough to print.

    python examples/attention_by_hand.py

No weights are needed: one row, one head, q (N,d), k and v (M,d) with random numbers. In the UNet they are projections
of tokens: self-attention takes all three from the picture, cross-attention takes k and v from the prompt.
"""

import numpy as np
import torch

from isadca import Site, attend, attend_reference, blend, capture, dca, isa

N, D = 4, 8  # queries, head dim
SELF = Site("up_blocks.3.attentions.0.transformer_blocks.0.attn1", "self", "up", 13, (2, 2))
CROSS = SELF._replace(name=SELF.name.replace("attn1", "attn2"), kind="cross")


# ---- the kernels, by hand ------------------------------------------------------------------------------------

def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))  # the shift cancels out; without it exp could overflow
    return powers / powers.sum(-1, keepdims=True)


def attention(q, k, v):
    """Eq. 6. Each query compares itself with each key and takes the mean of the values, weighted by the match."""
    return softmax(q @ k.T / np.sqrt(q.shape[-1])) @ v


def isa_append(q, k, v, k_ref, v_ref):
    """Eq. 5. The reference's tokens stand beside the picture's own; each query takes from both what fits."""
    return attention(q, np.concatenate([k_ref, k]), np.concatenate([v_ref, v]))


def decoupled(q, k, v, k_ip, v_ip, scale):
    """Eq. 8. Two attentions with the same queries, each with a softmax of its own: neither can crowd out the other."""
    return attention(q, k, v) + scale * attention(q, k_ip, v_ip)


def log_sum_exp(q, k):
    """log Σ exp(score): how well a set of keys as a whole fits each query. (N,1)."""
    return np.log(np.exp(q @ k.T / np.sqrt(q.shape[-1])).sum(-1, keepdims=True))


def lift(x):
    return torch.from_numpy(x)[None, None]  # (N,d) -> (1,1,N,d), one row and one head


def compare(name, by_hand, build, qkv, site=SELF):
    """Print and return the largest difference from our variant, over both of our kernels."""
    ours = [build(kernel)(*map(lift, qkv), site)[0, 0].numpy() for kernel in (attend_reference, attend)]
    difference = max(np.abs(y - by_hand).max() for y in ours)
    print(f"  {name:<42} NumPy - isadca: {difference:.0e}")
    return difference


def bars(shares):
    for i, share in enumerate(shares):
        print(f"    query {i}   {'█' * round(20 * share):░<20} {share:4.0%}")


def main() -> list[float]:
    rng = np.random.default_rng(3)
    q, k, v, k_ref, v_ref = 1.2 * rng.standard_normal((5, N, D))  # the picture's, and those of the reference
    own, plain, alone = (q, k, v), attention(q, k, v), attention(q, k_ref, v_ref)

    print("Softmax attention, Eq. 6. How much each query (row) looks at each key (column):")
    print("\n".join("    " + "  ".join(f"{p:.2f}" for p in row) for row in softmax(q @ k.T / np.sqrt(D))))
    found = [compare("attention", plain, lambda f: f, own)]

    print("\nIntra-image self-attention, Eq. 5. A first pass over the reference leaves its keys and values in a store,")
    print("a second pass over the picture appends them. Share of the attention that goes to the reference:")
    store = {}
    capture(store)(lift(q), lift(k_ref), lift(v_ref), SELF)
    w = 1 / (1 + np.exp(log_sum_exp(q, k) - log_sum_exp(q, k_ref)))  # (N,1): a gate, open where the reference fits
    bars(w[:, 0])
    found += [compare("isa, append", isa_append(q, k, v, k_ref, v_ref), lambda f: isa(store, kernel=f), own),
              compare("isa as that gate: w·reference + (1-w)·own", w * alone + (1 - w) * plain,
                      lambda f: isa(store, kernel=f), own),
              compare("isa, replace: the reference alone", alone, lambda f: isa(store, "replace", f), own)]

    print("\nDecoupled cross-attention, Eq. 8: text + scale × image, with the same queries.")
    k_text, v_text = rng.standard_normal((2, 5, D))  # five tokens of prompt
    k_ip, v_ip = rng.standard_normal((2, 4, D))      # four tokens of image prompt
    ip_kv = {CROSS.name: (lift(k_ip), lift(v_ip))}
    for scale in (0.0, 0.5, 1.0):
        found.append(compare(f"dca, scale {scale}", decoupled(q, k_text, v_text, k_ip, v_ip, scale),
                             lambda f: dca(ip_kv, scale, f), (q, k_text, v_text), CROSS))

    print("\nλ inside attention: (1-λ)·plain + λ·ISA. It turns the gate down from w to λw; for λ = 0.7:")
    bars(0.7 * w[:, 0])
    for lam in (0.0, 0.7, 1.0):
        found.append(compare(f"blend, λ = {lam}", lam * w * alone + (1 - lam * w) * plain,
                             lambda f: blend(f, isa(store, kernel=f), lam), own))
    return found


if __name__ == "__main__":
    main()
