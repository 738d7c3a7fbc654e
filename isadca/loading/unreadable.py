"""Why a file is no safetensors file, in one line; imported when one is not."""

from pathlib import Path

from safetensors import SafetensorError

from ..common.problem import Problem


def unreadable(path: Path, error: Exception) -> Problem:
    """Why a header cannot be read."""
    if not path.exists():
        return Problem(f"{path}: no such file; check the path, and that the model is complete")
    if path.is_dir():
        return Problem(f"{path}: is a folder, expected a .safetensors file")
    if not path.is_file():
        return Problem(f"{path}: is no regular file, expected a .safetensors file")
    if isinstance(error, SafetensorError | ValueError):
        return Problem(f"{path}: {_not_safetensors(path)} ({str(error)[:60]})")
    reason = getattr(error, "strerror", None) or error  # no permission; no memory to map it into
    return Problem(f"{path}: cannot be read ({reason}); check the file, or free memory")


def _not_safetensors(path: Path) -> str:
    """What a file is that the safetensors library refused, from its first bytes."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02"):
        return ("is a pickle, which can run code when it is opened; get the .safetensors version, or make it: "
                "isadca convert FILE -o NAME.safetensors")
    if start == b"GGUF":
        return "is a GGUF file; get the .safetensors version"
    if start == b"vers":
        return "is a Git LFS pointer, not the file itself; run git lfs pull"
    if not start:
        return "is empty; download it again"
    return "is not a whole safetensors file; download it again"
