"""InstantStyle, arXiv 2404.02733; authors' code: instantX-research/InstantStyle.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/instant_style.py:INSTANT_STYLE

    Z = CA(Q, K_text, V_text) + [layer is a style layer] · s · CA(Q, K_image, V_image)

An IP-Adapter whose image prompt acts in one block of the UNet only: there it carries the look and not the content,
so that the prompt decides what is shown. For SD1.5 the authors name up_blocks.1 and, to keep layout too,
down_blocks.2 and mid_block. The reference's keys and values are not used.
"""

from isadca import Method, dca, where

BLOCKS = ("up_blocks.1.",)


def instant_style(controls):
    style = dca(controls.ip_kv, controls.method.ip_scale, controls.kernel)
    return where(lambda site: site.name.startswith(BLOCKS), style, controls.kernel)


INSTANT_STYLE = Method("instant-style", mix=instant_style, guidance=5.0, init="random",
                       source="InstantStyle, arXiv 2404.02733; infer_style_sd15.py")
