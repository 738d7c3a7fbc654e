"""What every other module may raise: an error that its reader can mend."""


class Problem(ValueError):
    """Something the user can mend. The text is one line: what is wrong, in which file or flag, what to do."""

    def __init__(self, text: str):
        super().__init__(" ".join(text.splitlines()))  # a file's name, or what is in it, may hold line breaks
