"""T-GATE, arXiv 2404.02747; authors' code: HaozheLiu-ST/T-GATE.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/t_gate.py:T_GATE

    after step m:    CA ← (CA_u + CA_c) / 2 as they were at step m,    ε = ε_θ(z_t) of one row

Cross-attention plans the picture in the first steps and changes little afterwards: its output, the mean of both
guidance halves, is kept at the gate and reused to the end. Both halves would then be equal, so one of them and the
guidance are dropped; that is what saves the time. The reference is not used.
"""

from isadca import Method
from isadca.loop import Guided

GATE = 0.4  # m, as a share of the steps: 10 of 25


def t_gate(controls):
    kernel, kept, gate = controls.kernel, controls.conditions.kept, round(GATE * controls.steps)

    def keep(q, k, v, site):
        y = kernel(q, k, v, site)
        if site.kind == "cross":
            kept[site.name] = sum(y.chunk(controls.halves)) / controls.halves
        return y

    def reuse(q, k, v, site):
        return kept[site.name] if site.kind == "cross" else kernel(q, k, v, site)

    if controls.i >= gate:
        return [Guided(controls.conditions.text_kv[-1], reuse, 0.0)]
    return keep if controls.i == gate - 1 else kernel


T_GATE = Method("t-gate", mix=t_gate, guidance=7.5, init="random", ip_scale=0,
                source="T-GATE, arXiv 2404.02747; gate 10 of 25 steps, cross-attention")
