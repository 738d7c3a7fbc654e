"""What every other module may raise: an error that its reader can mend; and arguments that are looked at first."""

from collections.abc import Iterable

LONGEST = 290  # characters; with "isadca: " before them, and a little room, 300


class Problem(ValueError):
    """Something the user can mend. The text is one line: what is wrong, in which file or flag, what to do."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


def expect(name: str, value: object, kind, what: str) -> None:
    """Raises Problem for an argument of another type."""
    if not isinstance(value, kind):
        text = repr(value)
        raise Problem(f"{name} is {text if len(text) < 60 else f'of type {type(value).__name__}'}, expected {what}")


def expect_all(name: str, values: Iterable, kind, what: str) -> None:
    """The same for each of several."""
    expect(name, values, Iterable, what)
    for value in values:
        expect(name, value, kind, what)


def expect_names(given: Iterable[str], known: set[str]) -> None:
    """Raises Problem for a keyword that is not known."""
    if unknown := [name for name in given if name not in known]:
        from .habits import meant
        near = meant(unknown[0], known)
        raise Problem(f"{unknown[0]} is no option" + (f"; did you mean {near}?" if near else ""))


def one_line(text: str) -> str:
    """`text` as a terminal may show it, whatever a file's name or content put into it: without line breaks and control
    codes, and cut in the middle, since the beginning says what is wrong and the end what to do."""
    text = " ".join(text.splitlines())
    if len(text) > LONGEST:
        text = f"{text[:LONGEST // 2 - 3]} ... {text[3 - LONGEST // 2:]}"
    return "".join(c if c.isprintable() else "?" for c in text)
