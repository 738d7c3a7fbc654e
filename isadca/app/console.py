"""Standard output and error. Writing there never stops the work: a stream that is closed, full, or cannot print λ
is written to as far as possible, and `main` reports its failure at the end."""

import json
import sys
from pathlib import Path

from ..common.problem import one_line


class Steady:
    """A text stream whose failures are kept in `error`, not raised."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, name: str, *args) -> None:
        try:
            if self.stream is not None and self.error is None:
                getattr(self.stream, name)(*args)
        except (OSError, ValueError) as error:  # a ValueError where the stream was closed
            self.error = error

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def say(message: str) -> None:
    print("isadca: " + one_line(message), file=sys.stderr)


def note(message: str) -> None:
    say(f"note: {message}")


def log(path: Path | None, **entry) -> None:
    """One line of JSON for another program that follows the work."""
    if path is None:
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
