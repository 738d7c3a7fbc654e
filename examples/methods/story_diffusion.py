"""StoryDiffusion's consistent self-attention, arXiv 2405.01434; authors' code: HVision-NKU/StoryDiffusion.

    isadca vary examples/pig.png "a cat" -o cat.png --n 4 --grid cats.png \
        --method examples/methods/story_diffusion.py:STORY_DIFFUSION

    Z_i = SA(Q_i, [K_i; S], [V_i; ...]),    S: a random share of the tokens of the other pictures of the batch

Pictures made together read one another's tokens and so agree on who is in them. The same tokens are drawn for all,
anew at each step; the first steps are plain, so that the pictures differ in composition. In the decoder and the middle
of the UNet. The reference is not used, and one picture alone is a plain one.
"""

import torch
import torch.nn.functional as F

from isadca import Method

SHARE, PLAIN = 0.5, 0.1  # of the others' tokens; of the steps


def story_diffusion(controls):
    n, kernel = controls.n, controls.kernel

    def attend(q, k, v, site):
        if site.kind != "self" or site.place == "down":
            return kernel(q, k, v, site)
        drawn = torch.rand(n, q.shape[2], generator=torch.Generator().manual_seed(controls.i)) < SHARE
        own = torch.eye(n, dtype=torch.bool)[:, :, None]
        seen = (drawn | own).flatten(1)[:, None, None].to(q.device)                       # (n,1,1,n·N)
        halves = [F.scaled_dot_product_attention(
            q_half, *(x.transpose(0, 1).flatten(1, 2).expand(n, -1, -1, -1) for x in kv_half), attn_mask=seen)
            for q_half, *kv_half in zip(q.split(n), k.split(n), v.split(n))]
        return torch.cat(halves)
    return kernel if controls.i < PLAIN * controls.steps else attend


STORY_DIFFUSION = Method("story-diffusion", mix=story_diffusion, guidance=7.5, init="random", ip_scale=0,
                         source="StoryDiffusion, arXiv 2405.01434; half of the tokens")
