"""ToDo, token downsampling, arXiv 2402.13573; authors' code: ethansmith2000/ImprovedTokenMerge.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/todo.py:TODO

    Z = SA(Q, D(K), D(V)),    D: every second token of the grid in both directions

Neighbours on a fine grid say nearly the same, so a quarter of the keys and values is enough, at a quarter of the cost;
the queries and the grid stay. On the finest grid only. It pays for large pictures: at 1024² and above, attention there
takes most of the time. The reference is not used.
"""

from isadca import Method

FACTOR = 2  # of D, in each direction


def todo(controls):
    side = controls.z.shape[-1]

    def attend(q, k, v, site):
        if site.kind == "self" and site.hw[1] == side:
            k, v = (thinned(x, site.hw) for x in (k, v))
        return controls.kernel(q, k, v, site)
    return attend


def thinned(x, hw):
    """(B,H,h·w,d) -> (B,H,h/f·w/f,d)."""
    return x.unflatten(2, hw)[:, :, ::FACTOR, ::FACTOR].flatten(2, 3)


TODO = Method("todo", mix=todo, guidance=7.5, init="random", ip_scale=0,
              source="ToDo, arXiv 2402.13573; factor 2 on the finest grid")
