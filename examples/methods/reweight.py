"""Prompt-to-Prompt's re-weighting, arXiv 2208.01626; authors' code: google/prompt-to-prompt.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/reweight.py:REWEIGHT

    A ← A · c in the columns of one word,    A = softmax(QKᵀ / √d) of the text half;    Z = A V

A slider for a word: c = 0 silences it, above 1 it is louder. The rows are not made to sum to 1 again. The
unconditional half stays as it is, so that guidance strengthens the change. The reference is not used.
"""

import torch

from isadca import Method, attention_probs

WORD, WEIGHT = -1, 2.0  # which word of the prompt, -1 is the last; c


def reweight(controls):
    n, kernel, (_, rows) = controls.n, controls.kernel, controls.conditions.words[WORD]

    def attend(q, k, v, site):
        if site.kind != "cross":
            return kernel(q, k, v, site)
        louder = torch.ones(k.shape[2]).to(q)
        louder[rows] = WEIGHT
        probs = attention_probs(q[-n:], k[-n:]) * louder
        return torch.cat([kernel(q[:-n], k[:-n], v[:-n], site), probs @ v[-n:]])
    return attend


REWEIGHT = Method("reweight", mix=reweight, guidance=7.5, init="random", ip_scale=0,
                  source="Prompt-to-Prompt, arXiv 2208.01626, attention re-weighting")
