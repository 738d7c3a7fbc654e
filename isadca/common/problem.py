"""What every other module may raise: an error that its reader can mend."""

LONGEST = 290  # characters; with "isadca: " before them, and a little room, 300


class Problem(ValueError):
    """Something the user can mend. The text is one line: what is wrong, in which file or flag, what to do."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """`text` as a terminal may show it, whatever a file's name or content put into it: without line breaks and control
    codes, and cut in the middle, since the beginning says what is wrong and the end what to do."""
    text = " ".join(text.splitlines())
    if len(text) > LONGEST:
        text = f"{text[:LONGEST // 2 - 3]} ... {text[3 - LONGEST // 2:]}"
    return "".join(c if c.isprintable() else "?" for c in text)
