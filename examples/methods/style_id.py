"""StyleID, arXiv 2312.09008; authors' code: jiwoogit/StyleID.

    isadca vary examples/pig.png "" -o pig.png --also examples/rocket.png --method examples/methods/style_id.py:STYLE_ID

    Z = softmax(τ Q̃ K_styleᵀ / √d) V_style,    Q̃ = γ Q_ref + (1 - γ) Q,    z_T = AdaIN(z̄_T, z̄_T of the style)

The reference gives the content, --also the style; without it a picture is its own style. The content's queries hold its
layout, the style's keys and values paint it, and τ sharpens the maps, which are flatter between two pictures than in
one. In the decoder, on the latent's grid and the next. There is no prompt and no guidance.
"""

from isadca import Method
from isadca.loop import adain

GAMMA, TAU = 0.75, 1.5  # γ: how much of the content's queries stays; τ


def style_id(controls):
    side, references = controls.z.shape[-1], len(controls.ref_z)

    def attend(q, k, v, site):
        if site.kind == "cross" or site.place != "up" or site.hw[1] * 2 < side:
            return controls.kernel(q, k, v, site)
        q_ref, _ = controls.ref_qk[site.name]
        k_style, v_style = (x.chunk(references, 2)[-1].expand(len(q), -1, -1, -1) for x in controls.ref_kv[site.name])
        return controls.kernel(TAU * (GAMMA * q_ref + (1 - GAMMA) * q), k_style, v_style, site)
    return attend


def start(model, controls):
    return adain(controls.z, controls.ref_z[-1:]) if controls.i == 0 else controls.z


STYLE_ID = Method("style-id", mix=style_id, before_step=start, guidance=1.0, ip_scale=0, ref_maps=True,
                  source="StyleID, arXiv 2312.09008; γ = 0.75, τ = 1.5")
