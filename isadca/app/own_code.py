"""The user's own code, FILE.py:NAME: loaded as `python FILE.py` would find it, and its failures shown as theirs.

Only what the user types is loaded; what a recipe or a results folder names is not.
"""

import hashlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.files import sha256
from ..common.problem import Problem

MARK = "__isadca_own_code__"  # in the globals of a module that was loaded here


def is_own(text: str) -> bool:
    """Whether this is FILE.py:NAME rather than a built-in name."""
    return text.rpartition(":")[0].endswith(".py")


def load_own(where: str, flag: str = "--method") -> tuple[Any, str]:
    """FILE.py:NAME -> the object, and the sha256 of the code: of the file, and of all that it imports from its folder.
    Raises Problem; the user wrote `flag`."""
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not is_own(where) or "\0" in file or not path.is_file():
        raise Problem(f"{flag} is {where!r}, expected FILE.py:NAME, such as examples/my_attention.py:my_attention")
    try:
        source = path.read_bytes()
        digests = [hashlib.sha256(source).hexdigest()]
        module = ModuleType(f"own_code_{digests[0][:12]}")
        module.__file__ = str(path.resolve())
        setattr(module, MARK, True)
        sys.modules[module.__name__] = module  # dataclasses and pickle look for it there
        with _importable(path.resolve().parent) as neighbours:
            exec(compile(source, module.__file__, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise Problem(f"{path}{_line(error, path)}: {_said(error)}; mend {flag}'s file") from None
    if name not in vars(module):
        near = [key for key, value in vars(module).items()
                if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__]
        raise Problem(f"{path}: has no {name!r}, expected one of its own names: {', '.join(near) or 'it has none'}")
    digests += map(sha256, neighbours)
    several = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    return vars(module)[name], digests[0] if len(digests) == 1 else several


@contextmanager
def _importable(folder: Path) -> Iterator[list[Path]]:
    """The folder's modules can be imported. Afterwards their files are in the list, sys.path is as before, and another
    folder's `helpers.py` will not be taken for this one's."""
    before, path, files = set(sys.modules), sys.path[:], list[Path]()
    sys.path.insert(0, str(folder))
    try:
        yield files
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - before:
            if _is_neighbour(name, folder, before):
                file = getattr(sys.modules.pop(name), "__file__", None)
                files += [Path(file)] if file else []  # a folder without __init__.py is no file


def _is_neighbour(name: str, folder: Path, before: set[str]) -> bool:
    """Whether a module is the user's: not part of a package that was there before, as isadca is in a clone's root, nor
    of a virtual environment inside the folder."""
    module, place = sys.modules[name], folder.joinpath(*name.split("."))
    found = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    return name.partition(".")[0] not in before and found in (f"{place}.py", f"{place}/__init__.py", str(place))


def own_failure(error: BaseException) -> tuple[str, str] | None:
    """For an error raised in the user's own code or in what it called: its frames as Python prints them, and one line.
    None for any other error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    folders = {str(Path(frame.f_code.co_filename).parent) for frame, _ in frames if MARK in frame.f_globals}
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if str(Path(frame.filename).parent) in folders]
    if not own:
        return None
    last = own[-1]
    return ("".join(traceback.format_list(own)),
            f"{last.filename}, line {last.lineno}, in {last.name}: {_said(error)}; this is your own code")


def _line(error: BaseException, path: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path.resolve())]
    at = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f", line {at}" if at else ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
