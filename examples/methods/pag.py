"""Perturbed-attention guidance, arXiv 2403.17377; authors' code: cvlab-kaist/Perturbed-Attention-Guidance.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/pag.py:PAG

    ε = ε_u + m (ε_c - ε_u) + s (ε_c - ε̂_c),    ε̂_c with SA(Q, K, V) = V in the middle of the UNet

A map that is the identity destroys structure, and guidance leads away from what has none. This is a third row of
guidance, written relative to the first, ε_u, since the loop adds up differences from that row; with --guidance 1
there is PAG alone. The reference is not used.
"""

from isadca import Method
from isadca.loop import Guided

PLACES = ("mid",)  # where the map becomes the identity: "down", "mid", "up"
SCALE = 3.0        # s


def pag(controls):
    kernel, m, (*unconditional, text) = controls.kernel, controls.method.guidance, controls.conditions.text_kv

    def perturbed(q, k, v, site):
        return v if site.kind == "self" and site.place in PLACES else kernel(q, k, v, site)

    if not unconditional:  # ε̂_c + (1 + s) (ε_c - ε̂_c)
        return [Guided(text, perturbed, 0.0), Guided(text, kernel, 1 + SCALE)]
    return [Guided(*unconditional, kernel, 0.0), Guided(text, kernel, m + SCALE), Guided(text, perturbed, -SCALE)]


PAG = Method("pag", mix=pag, guidance=4.0, init="random", ip_scale=0,
             source="PAG, arXiv 2403.17377; s = 3, the middle block")
