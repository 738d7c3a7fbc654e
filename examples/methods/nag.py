"""Normalized attention guidance, arXiv 2505.21179; authors' code: ChenDarYen/Normalized-Attention-Guidance.

    isadca vary examples/pig.png "a lemon" -o lemon.png --negative "a dog" --method examples/methods/nag.py:NAG

    Z̃ = φ Z⁺ - (φ - 1) Z⁻,    Ẑ = Z̃ · min(r, τ) / r with r = ‖Z̃‖₁ / ‖Z⁺‖₁,    Z = α Ẑ + (1 - α) Z⁺

The negative prompt acts inside cross-attention: Z⁺ and Z⁻ are what the same queries read from the prompt and from the
negative prompt. Both halves get Z and are equal, so that classifier-free guidance drops out. No reference is used.
"""

from isadca import Method, Problem

SCALE, TAU, ALPHA = 5.0, 2.5, 0.5  # φ, τ, α


def nag(controls):
    n, kernel = controls.n, controls.kernel
    if controls.halves == 1:
        raise Problem("guidance is 1, where there is no negative prompt; expected any other number")

    def attend(q, k, v, site):
        if site.kind != "cross":
            return kernel(q, k, v, site)
        negative, positive = (kernel(q, k[half].repeat(2, 1, 1, 1), v[half].repeat(2, 1, 1, 1), site)
                              for half in (slice(0, n), slice(n, None)))
        guided = SCALE * positive - (SCALE - 1) * negative
        ratio = length(guided) / length(positive).clamp_min(1e-12)
        guided = guided * ratio.clamp_max(TAU) / ratio.clamp_min(1e-12)
        return ALPHA * guided + (1 - ALPHA) * positive
    return attend


def length(z):  # ‖Z‖₁ of each query, over all heads
    return z.abs().sum((1, 3), keepdim=True)


NAG = Method("nag", mix=nag, guidance=7.0, init="random", ip_scale=0,
             source="NAG, arXiv 2505.21179; pipeline_sdxl_nag.py for τ and α")
