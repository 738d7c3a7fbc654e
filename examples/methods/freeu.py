"""FreeU, arXiv 2309.11497; authors' code: ChenyangSi/FreeU.

    isadca vary examples/pig.png "a lemon" -o lemon.png --method examples/methods/freeu.py:FREEU

    x[first half of the channels] ← b · x,    skip ← F⁻¹(F(skip) · s at the lowest frequencies, 1 elsewhere)

Where the way up joins its own activation x with a skip of the way down, x denoises and the skip brings detail: b makes
x louder, s makes the skip's coarse part quieter. In the two coarsest blocks. The reference is not used.
"""

import torch

from isadca import Method

B, S = (1.5, 1.6), (0.9, 0.2)  # of up_blocks.0 and up_blocks.1: what the authors advise for SD1.5
BACKBONE = {"mid_block.resnets.1": 0, "up_blocks.0.resnets.0": 0, "up_blocks.0.upsamplers.0": 1,
            "up_blocks.1.attentions.0": 1}  # SD1.5 has a layer more: up_blocks.0.resnets.1, up_blocks.1.attentions.1


def freeu(controls):
    def edit(h, place):
        if place in BACKBONE:
            half = h.shape[1] // 2
            return torch.cat([B[BACKBONE[place]] * h[:, :half], h[:, half:]], 1)
        if place.startswith(("up_blocks.0.skips.", "up_blocks.1.skips.")):
            waves = torch.fft.fft2(h.float() if h.dtype.itemsize == 2 else h)
            waves[..., [[-1], [0]], [-1, 0]] *= S[int(place[10])]  # frequencies -1 and 0 both ways, as the authors do
            return torch.fft.ifft2(waves).real.to(h.dtype)
        return h
    return edit


FREEU = Method("freeu", mix=lambda controls: controls.kernel, edit=freeu, guidance=7.5, init="random", ip_scale=0,
               source="FreeU, arXiv 2309.11497; SD1.5's b and s")
