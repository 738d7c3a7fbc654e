"""A short cut for CPUs: plain attention and ISA blended for the price of ISA alone. Shapes: as in attention.py."""

import torch
from torch import Tensor

from ..attention import KV, Attend, attend, blend, isa, repeat_rows


def blend_isa(ref_kv: KV, lam: float | Tensor, mode: str = "append", kernel: Attend = attend) -> Attend:
    """(1-λ)·plain + λ·ISA. The same as `blend(kernel, isa(ref_kv, mode), lam)`, computed another way.

    ISA's softmax runs over the reference's keys and z_t's own, so ISA = p·ref + (1-p)·own: attention to either alone,
    and the share p that the reference gets. The blend is then own + λ·p·(ref - own), with two products of N × N
    instead of three: 13 % of the arithmetic of SD1.5's UNet at 512². Only torch's CPU kernel gives what p needs, and
    no gradient through it; elsewhere, and where a gradient is wanted, both sides are computed.
    """
    both = blend(kernel, isa(ref_kv, mode, kernel), lam)
    if kernel is not attend or lam in (0, 1) or mode == "replace":
        return both

    def attend_blend(q, k, v, site):
        if site.kind != "self" or q.device.type != "cpu":
            return both(q, k, v, site)
        k_ref, v_ref = (repeat_rows(x, len(q)) for x in ref_kv[site.name])
        if torch.is_grad_enabled() and any(wants_gradient(x) for x in (q, k, v, k_ref, v_ref, lam)):
            return both(q, k, v, site)
        (own, own_sum), (ref, ref_sum) = attend_and_sum(q, k, v), attend_and_sum(q, k_ref, v_ref)
        p = torch.sigmoid(ref_sum - own_sum).unsqueeze(-1).to(own.dtype)
        return torch.lerp(own, ref, lam * p)
    return attend_blend


def attend_and_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` on a CPU, and log Σ exp(QKᵀ/√d) over the keys, (B,H,N), which carries no gradient."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def wants_gradient(x: Tensor | float) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
