"""DenseDiffusion, arXiv 2308.12964; authors' code: naver-ai/DenseDiffusion.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/dense_diffusion.py:DENSE_DIFFUSION

    softmax((QKᵀ + M) / √d) V,    M = λ_t (1 - S) [R (max - QKᵀ) - (1 - R) (QKᵀ - min)],    λ_t = w (t/1000)⁵

R_ij says whether query i may read key j: in cross-attention, a region's cells read its words; in self-attention,
cells of the same region. max and min are those of the row, S is the share of the grid that the query's region has.
Text half, first 30 % of the steps. Here BOX is the region of the prompt's last word. The reference is not used.
"""

import torch

from isadca import Method

BOX = (0.2, 0.5, 0.8, 1.0)          # top, left, bottom, right, as shares of the picture
W = {"cross": 1.0, "self": 0.3}


def dense_diffusion(controls):
    n, kernel, rows = controls.n, controls.kernel, controls.conditions.words[-1][1]

    def attend(q, k, v, site):
        (h, w), text = site.hw, slice(-n, None)
        y, x = ((torch.arange(side, device=q.device) + 0.5) / side for side in site.hw)
        inside = ((BOX[0] < y) & (y < BOX[2]))[:, None] & ((BOX[1] < x) & (x < BOX[3]))
        region = torch.stack([inside, ~inside]).flatten(1).to(q)                  # (2,N)
        same = region.T @ region                                                  # of one region, (N,N)
        words = torch.zeros(h * w, k.shape[2]).to(q).index_fill(1, torch.tensor(rows).to(q.device), 1)
        allowed = same if site.kind == "self" else words * region[0, :, None]
        scores = q[text] @ k[text].transpose(-1, -2) / q.shape[-1] ** 0.5
        up, down = scores.amax(-1, keepdim=True) - scores, scores - scores.amin(-1, keepdim=True)
        weight = W[site.kind] * (controls.t / 1000) ** 5 * (1 - same.mean(1, keepdim=True))
        scores = scores + weight * (allowed * up - (1 - allowed) * down)
        return torch.cat([kernel(q[:-n], k[:-n], v[:-n], site), scores.softmax(-1) @ v[text]])
    return attend if controls.i < 0.3 * controls.steps else kernel


DENSE_DIFFUSION = Method("dense-diffusion", mix=dense_diffusion, init="random", ip_scale=0, source="arXiv 2308.12964")
