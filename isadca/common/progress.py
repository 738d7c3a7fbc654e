"""How the progress of work is shown: the library calls a Progress around a list of steps and prints nothing itself."""

from collections.abc import Callable, Iterable

Progress = Callable[[list, str], Iterable]  # wraps a list of steps, e.g. in a progress bar


def silent(items: list, label: str) -> Iterable:
    return items


def shown(progress: Progress | bool | None) -> Progress:
    """A Progress as it is; True means tqdm's bar (in notebooks, its widget); False and None are silent."""
    if progress is True:
        from tqdm.auto import tqdm
        return lambda items, label: tqdm(items, desc=label)
    return progress or silent
