"""Where the networks compute, and in which precision."""

import torch

from .problem import Problem


def device_named(name: str) -> torch.device:
    """"auto", "cpu", "cuda:1", ... -> a device that works here. Raises Problem."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name).cpu()  # "meta" would be accepted otherwise
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # torch.hpu is a module of others
        raise Problem(f"device {name!r} is not available here; try --device cpu") from None


def dtype_named(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """auto: half precision on CUDA, float32 elsewhere (on most CPUs bfloat16 takes twice as long). Raises Problem."""
    auto = torch.float16 if device.type == "cuda" else torch.float32
    names: dict = {"auto": auto, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
                   "fp64": torch.float64}
    if isinstance(name, torch.dtype) and name in names.values():
        return name
    if name not in names:
        raise Problem(f"dtype is {name!r}, expected {', '.join(names)}")
    return names[name]


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE overflows in fp16. In bf16 it alone cost more than the rest: 0.9 grey levels on average, up to 43."""
    return torch.float32 if dtype.itemsize == 2 else dtype
