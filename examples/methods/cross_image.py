"""Cross-image attention, arXiv 2311.03335; authors' code: garibida/cross-image-attention.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/cross_image.py:CROSS_IMAGE

    A = softmax(Q K_refᵀ / √d),    A ← clip(β (A - μ) + μ, 0, 1),    Z = A V_ref

The variation's queries pick what corresponds in the reference. Contrast β about the mean μ of a row keeps each query
to its few best matches, since a mix of many would be a blur. On the decoder's two finest grids, from a tenth of the
steps to nine or seven tenths. Left out: AdaIN on the latents, and guidance by the difference of two passes.
"""

from isadca import Method, attention_probs

CONTRAST = 1.67         # β
UNTIL = {1: 0.9, 2: 0.7}  # the share of the steps where it ends, by how much coarser than the latent the grid is


def cross_image(controls):
    progress, side = controls.i / controls.steps, controls.z.shape[-1]

    def attend(q, k, v, site):
        until = UNTIL.get(side // site.hw[1], 0)
        if site.kind != "self" or site.place != "up" or not 0.1 <= progress < until:
            return controls.kernel(q, k, v, site)
        k_ref, v_ref = controls.ref_kv[site.name]
        probs = attention_probs(q, k_ref)
        mean = 1 / k_ref.shape[2]  # of a row that sums to 1
        return (CONTRAST * (probs - mean) + mean).clamp(0, 1) @ v_ref
    return attend


CROSS_IMAGE = Method("cross-image", mix=cross_image, guidance=7.0, ip_scale=0,
                     source="Cross-image attention, arXiv 2311.03335; β = 1.67, decoder only")
