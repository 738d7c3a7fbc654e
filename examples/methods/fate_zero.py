"""FateZero, arXiv 2303.09535, on one picture; authors' code: ChenyangQiQi/FateZero.

    isadca vary examples/pig.png "a lemon" -o lemon.png --ref-prompt "a pig" \
        --method examples/methods/fate_zero.py:FATE_ZERO

    text half:  A_cross = A_ref in the columns of unchanged words;    A_self = M · A + (1 - M) · A_ref

The maps of the inverted reference, except that new words keep their own columns, and cells of the reference's object
their own self-attention (M = 1 where cross-attention to its word is above a share of the highest). Here the new word
is the last one. For a video the authors join frames as well.
"""

import torch
import torch.nn.functional as F

from isadca import Method, attention_probs

UNTIL, REF_ROWS, THRESHOLD, COARSE = 0.8, [2], 0.3, 2  # share of the steps; the rest as in masactrl_masks.py


def fate_zero(controls):
    maps, new, n = [], controls.conditions.words[-1][1], controls.n

    def attend(q, k, v, site):
        ref, own = attention_probs(*controls.ref_qk[site.name]), attention_probs(q[-n:], k[-n:])
        if site.kind == "cross":
            if site.hw[1] * COARSE == controls.z.shape[-1]:
                maps.append(ref[..., REF_ROWS].sum(-1).mean(1).unflatten(1, site.hw))           # (1,h,w)
            edited = torch.isin(torch.arange(k.shape[2]), torch.tensor(new)).to(q.device)       # by column
        else:
            heat = torch.stack(maps, 1).mean(1, keepdim=True) if maps else torch.zeros(1, 1, *site.hw)
            heat = F.interpolate(heat.to(q), site.hw).reshape(1, 1, -1, 1)
            edited = heat > THRESHOLD * heat.amax()                                             # by row
        rest = controls.kernel(q[:-n], k[:-n], v[:-n], site)
        return torch.cat([rest, torch.where(edited, own, ref) @ v[-n:]])
    return attend if controls.i < UNTIL * controls.steps else controls.kernel


FATE_ZERO = Method("fate-zero", mix=fate_zero, guidance=7.5, ip_scale=0, ref_maps=True, source="arXiv 2303.09535")
