"""How long work is shown: the library calls a Progress around a list of steps and prints nothing itself."""

from collections.abc import Callable, Iterable

Progress = Callable[[list, str], Iterable]  # wraps a list of steps, e.g. in a progress bar


def silent(items: list, label: str) -> Iterable:
    return items
