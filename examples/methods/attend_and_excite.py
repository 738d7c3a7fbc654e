"""Attend-and-Excite, arXiv 2301.13826; authors' code: yuval-alaluf/Attend-and-Excite.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/attend_and_excite.py:ATTEND_AND_EXCITE

    z_t ← z_t - α_t ∇L,    L = max over words s of 1 - max over cells of (G * A_s),    α_t = 20 √(1 ... 0.5)

A is cross-attention on a coarse grid, with a new softmax that leaves out the start token; G blurs 3 × 3 cells. In the
first half of the steps the gradient strengthens the least-read word. Left out: repeating that until L is low enough.
"""

import torch
import torch.nn.functional as F

from isadca import Method, attention_probs

WORDS, COARSE, UNTIL = slice(-1, None), 2, 0.5  # of the prompt; latent's side / maps' side (4 for SD1.5); of the steps


def excite(model, controls):
    if controls.i >= UNTIL * controls.steps:
        return controls.z
    maps, words = [], [row - 1 for _, own in controls.conditions.words[WORDS] for row in own]

    def read(q, k, v, site):
        if site.kind == "cross" and site.hw[1] * COARSE == controls.z.shape[-1]:
            maps.append(attention_probs(q, k).mean(1).transpose(1, 2).unflatten(2, site.hw))  # (n,M,h,w)
        return controls.kernel(q, k, v, site)
    with torch.enable_grad():
        z = controls.z.detach().requires_grad_()
        model.noise(z, controls.t, controls.conditions.text_kv[-1], read)
        heat = (100 * torch.stack(maps).mean(0)[:, 1:-1]).softmax(1)[:, words].flatten(0, 1)[:, None]
        g = torch.tensor([-2.0, 0, -2]).to(z).softmax(0)                                      # σ = 0.5 cells
        smooth = F.conv2d(F.pad(heat, (1, 1, 1, 1), "reflect"), (g[:, None] * g)[None, None])
        loss = 1 - smooth.amax((1, 2, 3)).view(controls.n, len(words)).amin(1)
        [slope] = torch.autograd.grad(loss.sum(), z)
    return controls.z - 20 * (1 - 0.5 * controls.i / controls.steps)**0.5 * slope


ATTEND_AND_EXCITE = Method("attend-and-excite", before_step=excite, lam=0, ip_scale=0, guidance=7.5, init="random",
                           source="Attend-and-Excite, arXiv 2301.13826")
