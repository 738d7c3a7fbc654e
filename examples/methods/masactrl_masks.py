"""MasaCtrl with masks, arXiv 2304.08465; authors' code: TencentARC/MasaCtrl, MutualSelfAttentionControlMaskAuto.

    isadca vary examples/pig.png "a lemon" -o lemon.png --ref-prompt "a pig" --method \
        examples/methods/masactrl_masks.py:MASACTRL_MASKS

    Z = M · SA(Q, K_ref, V_ref; M_ref) + (1 - M) · SA(Q, K_ref, V_ref; 1 - M_ref)

Queries of the object read the reference's object, the others its backdrop. A mask is cross-attention to the object's
word, averaged over the step's layers so far, scaled to 0 ... 1 and cut at a threshold.
"""

import torch
import torch.nn.functional as F

from isadca import Method, attention_probs

REF_ROWS, THRESHOLD, COARSE = [2], 0.5, 2  # the word's row in --ref-prompt; the cut; the latent's side / the maps'


def masactrl_masks(controls):
    maps, rows = [], controls.conditions.words[-1][1]  # a map by layer, (1+n,h,w), the reference's first

    def attend(q, k, v, site):
        if site.kind == "cross" and site.hw[1] * COARSE == controls.z.shape[-1]:
            ref = attention_probs(*controls.ref_qk[site.name])[..., REF_ROWS]
            own = attention_probs(q[-controls.n:], k[-controls.n:])[..., rows]
            maps.append(torch.cat([x.sum(-1).mean(1) for x in (ref, own)]).unflatten(1, site.hw))
        if site.kind == "cross" or site.layer not in controls.method.layers or not maps:
            return controls.kernel(q, k, v, site)
        heat = F.interpolate(torch.stack(maps, 1).mean(1, keepdim=True), site.hw).flatten(2)[:, :, None]
        heat = heat - heat.amin(-1, keepdim=True)
        ref, *own = (heat >= THRESHOLD * heat.amax(-1, keepdim=True)).split(1)  # (1,1,1,N) each
        k_ref, v_ref = (x.expand(len(q), -1, -1, -1) for x in controls.ref_kv[site.name])
        inside, outside = (F.scaled_dot_product_attention(q, k_ref, v_ref, attn_mask=m) for m in (ref, ~ref))
        return torch.where(torch.cat(own * controls.halves).transpose(2, 3), inside, outside)
    return attend


MASACTRL_MASKS = Method("masactrl-masks", mix=masactrl_masks, guidance=7.5, t_start=901, layers=tuple(range(-6, 0)),
                        ip_scale=0, ref_maps=True, source="MasaCtrl, arXiv 2304.08465, masks from cross-attention")
