"""Imported where a run meets inf or NaN: what to say about them."""

from torch import nn

from ..common.problem import Problem


def not_finite(model, stage: str, t: int | None) -> Problem:
    """Names the step of `stage` ("encoding", "sampling", ...), and the weight to blame if a file holds one."""
    dtype = model.vae_dtype if t is None else model.dtype
    half = dtype.itemsize == 2  # inf may then come from rounding; NaN comes from the file
    advice = ("try --dtype fp32" if half else "try a smaller --guidance or --ip-scale" if stage == "sampling"
              else "try another picture or checkpoint")
    for kind in ("unet", "vae", "text", "vision", "ip_adapter"):
        for name, weight in (getattr(model, kind) or nn.Module()).named_parameters():
            if weight.isnan().any() or not (half or weight.isfinite().all()):
                advice = f"{model.files.get(kind, kind)} holds them in {name}: download it again"
    step = "" if t is None else f" from step t = {t} on"
    return Problem(f"{stage}: inf or NaN{step}, in {str(dtype).removeprefix('torch.')}; {advice}")
