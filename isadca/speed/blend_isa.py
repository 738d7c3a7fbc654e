"""A short cut: plain attention and ISA blended for the price of ISA alone. Shapes: as in attention.py."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..attention import KV, Attend, attend, blend, isa, repeat_rows

KernelWithLSE = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
log = logging.getLogger(__name__)

# The kernels that `attend` may run on, and what each needs after q, k, v to give its normaliser as its second result.
FUSED = {("cpu", SDPBackend.FLASH_ATTENTION): ("_scaled_dot_product_flash_attention_for_cpu", ()),
         ("cuda", SDPBackend.FLASH_ATTENTION): ("_scaled_dot_product_flash_attention", ()),
         ("cuda", SDPBackend.EFFICIENT_ATTENTION): ("_scaled_dot_product_efficient_attention", (None, True)),
         ("cuda", SDPBackend.CUDNN_ATTENTION): ("_scaled_dot_product_cudnn_attention", (None, True))}


def blend_isa(ref_kv: KV, lam: float | Tensor, mode: str = "append", kernel: Attend = attend) -> Attend:
    """(1-λ)·plain + λ·ISA. The same as `blend(kernel, isa(ref_kv, mode), lam)`, computed another way.

    ISA's softmax runs over the reference's keys and z_t's own, so ISA = p·ref + (1-p)·own: attention to either alone,
    and the share p that the reference gets. The blend is then own + λ·p·(ref - own), with two products of N × N
    instead of three: 13 % of the arithmetic of SD1.5's UNet at 512². Where torch's kernel does not tell what p needs,
    and where a gradient is wanted, which p would not carry, both sides are computed.
    """
    both = blend(kernel, isa(ref_kv, mode, kernel), lam)
    if kernel is not attend or lam in (0, 1) or mode == "replace":
        return both

    def attend_blend(q, k, v, site):
        if site.kind != "self":
            return both(q, k, v, site)
        k_ref, v_ref = (repeat_rows(x, len(q)) for x in ref_kv[site.name])
        tensors = [x for x in (q, k, v, k_ref, v_ref, lam) if isinstance(x, Tensor)]
        gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        attend_with_lse = None if gradient else kernel_with_lse(q, k, v)
        if attend_with_lse is None:
            return both(q, k, v, site)
        (own, own_lse), (ref, ref_lse) = attend_with_lse(q, k, v), attend_with_lse(q, k_ref, v_ref)
        p = torch.sigmoid(ref_lse - own_lse).unsqueeze(-1).to(own.dtype)
        return torch.lerp(own, ref, lam * p)
    return attend_blend


def kernel_with_lse(q: Tensor, k: Tensor, v: Tensor) -> KernelWithLSE | None:
    """The fused kernel that `attend` runs on for such q, k, v, where it also gives log Σ exp(QKᵀ/√d) over the keys,
    (B,H,N), without a gradient; else None. torch's own ring attention joins parts of a softmax by the same numbers.
    """
    device, choose = q.device.type, private(torch, "_fused_sdp_choice")
    if choose is None or device not in {name for name, _ in FUSED}:
        return None
    name, options = FUSED.get((device, SDPBackend(choose(q, k, v))), ("", ()))
    fused = private(torch.ops.aten, name) if name else None
    if fused is None or device == "cuda" and q.shape[-1] % 8:  # `attend` pads such heads first
        return None

    def attend_with_lse(q, k, v):
        y, lse, *_ = fused(q, k, v, *options)
        return y, lse.flatten(2)[..., :q.shape[2]]  # "efficient" rounds N up, cuDNN has (B,H,N,1)
    return attend_with_lse


@cache
def private(module, name: str) -> Callable | None:
    """A function that torch does not promise to keep; None without it, and a line in the debug log, once."""
    found = getattr(module, name, None)
    if found is None:
        log.debug("torch %s has no %s: the attention mix computes a third product", torch.__version__, name)
    return found
