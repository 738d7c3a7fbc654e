"""Your own attention, in one function and one command.

    isadca vary examples/cat.png "a lemon" -o lemon.png --method examples/my_attention.py:my_attention

`controls` holds what a step has: t, lam, ref_kv (the reference's keys and values by site name), ip_kv (the image
prompt's), method and kernel. Return a function (q, k, v, site) -> y, with q (B,H,N,d), k and v (B,H,M,d).
This one is "early reference, late text": the middle block looks only at the reference for the first half of the steps,
all other layers look at reference and self all the time, and the image prompt has the weight 1 - lam.
"""

from isadca import by_kind, dca, isa, where


def my_attention(controls):
    coarse = isa(controls.ref_kv, "replace" if controls.t > 500 else "append", controls.kernel)
    fine = isa(controls.ref_kv, "append", controls.kernel)
    on_self = where(lambda site: site.place == "mid", coarse, fine)
    on_cross = dca(controls.ip_kv, (1 - controls.lam) * controls.method.ip_scale, controls.kernel)
    return by_kind(on_self, on_cross)
