"""Reference-only control; no paper: Mikubill/sd-webui-controlnet, discussion 1236, "reference_only".

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/reference_only.py:REFERENCE_ONLY

    Z = SA(Q, [K; K_ref], [V; V_ref]);    unconditional rows: f · SA(Q, K, V) + (1 - f) · Z

f is the style fidelity. If the unconditional half does not see the reference (f = 1), guidance strengthens the
reference along with the prompt; f = 0 is ISA. The extension noises the reference afresh at each step; here it is
inverted.
"""

from isadca import Method, blend, by_rows, isa

FIDELITY = 0.5  # f


def reference_only(controls):
    both = isa(controls.ref_kv, "append", controls.kernel)
    if controls.halves == 1:
        return both
    return by_rows(controls.n, blend(both, controls.kernel, FIDELITY), both)


REFERENCE_ONLY = Method("reference-only", mix=reference_only, guidance=7.0, init="random", ip_scale=0,
                        source="sd-webui-controlnet, reference_only with style fidelity 0.5")
