"""StyleAligned, arXiv 2312.02133; authors' code: google/style-aligned.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/style_aligned.py:STYLE_ALIGNED

    Q̂ = AdaIN(Q, Q_ref),  K̂ = AdaIN(K, K_ref),    Z = SA(Q̂, [K̂; K_ref], [V; V_ref])

ISA whose queries and keys first take the mean and deviation of the reference's, over the tokens: without that the
variation looks mostly at itself. The style is the reference's, the content the prompt's. Left out: the group and layer
norms that the authors share as well.
"""

import torch

from isadca import Method


def style_aligned(controls):
    def attend(q, k, v, site):
        if site.kind != "self":
            return controls.kernel(q, k, v, site)
        (q_ref, _), (k_ref, v_ref) = controls.ref_qk[site.name], controls.ref_kv[site.name]
        q, k = adain(q, q_ref), adain(k, k_ref)
        k_ref, v_ref = (x.expand(len(q), -1, -1, -1) for x in (k_ref, v_ref))
        return controls.kernel(q, torch.cat([k, k_ref], 2), torch.cat([v, v_ref], 2), site)
    return attend


def adain(x, ref):
    """x with ref's mean and deviation over the tokens, per head and channel. (B,H,N,d), (1,H,N,d)."""
    def moments(y):
        return y.mean(2, keepdim=True), (y.var(2, keepdim=True) + 1e-5).sqrt()
    (mean, std), (ref_mean, ref_std) = moments(x), moments(ref)
    return (x - mean) / std * ref_std + ref_mean


STYLE_ALIGNED = Method("style-aligned", mix=style_aligned, guidance=7.5, init="random", ip_scale=0, ref_maps=True,
                       source="StyleAligned, arXiv 2312.02133; shared attention with AdaIN on Q and K")
