"""Files: written whole or not at all, and their sha256."""

import hashlib
import os
import tempfile
from pathlib import Path

from .problem import Problem


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_text(text: str, path: str | Path) -> None:
    """Write a text whole or not at all, in UTF-8."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def try_write(path: str | Path) -> None:
    """Raises the Problem that atomic_write would, before the work."""
    Path(atomic_write(path).__enter__()).unlink()


class atomic_write:
    """`with atomic_write(path) as temporary:` - `path` appears, complete, only if the block succeeds."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> str:
        try:
            if self.path.exists() and not self.path.is_file():  # the rename would replace a device by a file
                raise OSError(0, "is not a regular file")
            handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        except OSError as error:
            raise self._problem(error) from None
        os.close(handle)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                os.chmod(self.temporary, 0o666 & ~_umask())  # mkstemp's and safetensors' 0600 is not what users expect
                os.replace(self.temporary, self.path)
        except OSError as failed:
            raise self._problem(failed) from None
        finally:
            Path(self.temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise self._problem(error) from None

    def _problem(self, error: OSError) -> Problem:
        return Problem(f"{self.path}: cannot write there ({error.strerror or error}); choose another -o")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
