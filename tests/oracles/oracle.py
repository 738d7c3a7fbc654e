"""The paper's attention, Eqs. 5, 6, 8 and 9, in NumPy float64 with plain loops: slow, and independent of isadca.

Not a test file. q is (B,H,N,d), k and v are (B,H,M,d); reference and image keys and values have R rows, which
stand for B/R neighbouring rows of the batch each.
"""

import math

import numpy as np


def attention(q, k, v, causal=False):
    """Eq. 6: softmax(QKᵀ/√d) V, query by query. Causal: query n sees the keys 0 to n."""
    rows, heads, queries, d = q.shape
    y = np.empty((rows, heads, queries, v.shape[-1]))
    for b in range(rows):
        for h in range(heads):
            for n in range(queries):
                visible = n + 1 if causal else k.shape[2]
                y[b, h, n] = weights(q[b, h, n], k[b, h, :visible]) @ v[b, h, :visible]
    return y


def weights(query, keys):
    """softmax of one query's scores. (d,), (M,d) -> (M,)."""
    scores = keys @ query / math.sqrt(len(query))
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def log_sum_exp(q, k):
    """log Σ_m exp(q·k_m/√d), the logarithm of the softmax's denominator. -> (B,H,N)."""
    scores = np.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    top = scores.max(-1)
    return top + np.log(np.exp(scores - top[..., None]).sum(-1))


def for_rows(x, rows):
    """The extra row that row b of the batch uses: (R,...) -> (rows,...)."""
    return np.stack([x[b * len(x) // rows] for b in range(rows)])


def isa(q, k, v, k_ref, v_ref, mode="append"):
    """Eqs. 5 and 6 after the projections: the tokens of z̄_t before those of z_t, or in their place."""
    k_ref, v_ref = for_rows(k_ref, len(q)), for_rows(v_ref, len(q))
    if mode == "replace":
        return attention(q, k_ref, v_ref)
    return attention(q, np.concatenate([k_ref, k], axis=2), np.concatenate([v_ref, v], axis=2))


def dca(q, k, v, k_ip, v_ip, scale=1.0):
    """Eq. 8; the paper's has scale 1."""
    return attention(q, k, v) + scale * attention(q, for_rows(k_ip, len(q)), for_rows(v_ip, len(q)))


def blend(first, second, lam):
    """Eq. 9's convex combination, λ being the share of `second`."""
    return lam * second + (1 - lam) * first


def project(x, w, heads):
    """W(x), split into heads. (B,N,C), (H·d,C) -> (B,H,N,d)."""
    y = np.einsum("bnc,ec->bne", x, w)
    d = len(w) // heads
    return np.stack([y[:, :, h * d: (h + 1) * d] for h in range(heads)], axis=1)


def isa_layer(z, z_ref, w_q, w_k, w_v, heads):
    """Eq. 5 from hidden states: Q = W_Q(z), K = W_K(z̄ ⊕ z), V = W_V(z̄ ⊕ z), then Eq. 6. -> (B,N,H·d)."""
    joined = np.concatenate([for_rows(z_ref, len(z)), z], axis=1)
    y = attention(project(z, w_q, heads), project(joined, w_k, heads), project(joined, w_v, heads))
    return np.concatenate([y[:, h] for h in range(heads)], axis=-1)


def dca_layer(z, text, image, w_q, w_k, w_v, w_k_ip, w_v_ip, heads):
    """Eqs. 7 and 8 from hidden states, the text's context c_p and the image's c_i. -> (B,N,H·d)."""
    q = project(z, w_q, heads)
    y = (attention(q, project(text, w_k, heads), project(text, w_v, heads))
         + attention(q, project(image, w_k_ip, heads), project(image, w_v_ip, heads)))
    return np.concatenate([y[:, h] for h in range(heads)], axis=-1)
