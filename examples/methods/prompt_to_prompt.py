"""Prompt-to-Prompt, word swap, arXiv 2208.01626; authors' code: google/prompt-to-prompt.

    isadca vary examples/pig.png "a lemon" -o lemon.png --ref-prompt "a pig" \
        --method examples/methods/prompt_to_prompt.py:PROMPT_TO_PROMPT

    text half:    Z = A_ref V,    A_ref = softmax(Q_ref K_refᵀ / √d)

The maps of the reference with its own prompt, the values of the new one: word j of the new prompt acts where word j
of the old one did, in the first 80 % of the steps. On coarse grids self-attention takes the reference's maps, too, in
the first 40 %. The prompts must have the same number of words. The authors' source is a picture being generated, here
it is an inverted one; negative-prompt inversion and null-text optimisation are left out.
"""

import torch

from isadca import Method, attention_probs

CROSS_UNTIL, SELF_UNTIL = 0.8, 0.4  # shares of the steps
COARSE = 2                          # self-attention: on grids this many times coarser than the latent, or more


def prompt_to_prompt(controls):
    n, kernel, progress = controls.n, controls.kernel, controls.i / controls.steps

    def attend(q, k, v, site):
        coarse = site.hw[1] * COARSE <= controls.z.shape[-1]
        if progress >= CROSS_UNTIL if site.kind == "cross" else progress >= SELF_UNTIL or not coarse:
            return kernel(q, k, v, site)
        probs = attention_probs(*controls.ref_qk[site.name])
        return torch.cat([kernel(q[:-n], k[:-n], v[:-n], site), probs @ v[-n:]])
    return attend


PROMPT_TO_PROMPT = Method("prompt-to-prompt", mix=prompt_to_prompt, guidance=7.5, ip_scale=0, ref_maps=True,
                          source="Prompt-to-Prompt, arXiv 2208.01626; replace, 0.8 cross and 0.4 self")
