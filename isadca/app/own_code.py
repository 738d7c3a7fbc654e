"""The user's own code, FILE.py:NAME: loaded as `python FILE.py` would find it, made a Method whose attention is checked
while it runs, and its failures shown as the user's.

Only what the user types is loaded; what a recipe or a results folder names is not.
"""

import hashlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.files import sha256
from ..common.problem import Problem
from ..methods import Method

MARK = "__isadca_own_code__"  # in the globals of a module that was loaded here


def is_own(text: str) -> bool:
    """Whether this is FILE.py:NAME rather than a built-in name."""
    return text.rpartition(":")[0].endswith(".py")


def load_own(where: str, flag: str) -> tuple[Any, str]:
    """FILE.py:NAME -> the object, and the sha256 of the code: of the file, and of all that it imports from its folder.
    `flag` is the one that it was given to. Raises Problem."""
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


# ---- as a Method -------------------------------------------------------------------------------------------------

def own_method(where: str) -> tuple[Method, str]:
    """FILE.py:NAME as a Method, and the sha256 of its code."""
    value, digest = load_own(where, "--method")
    return as_method(value, where), digest


def as_method(value: Any, where: str) -> Method:
    """A Method, or a function Controls -> Attend as the `mix` of one; what its attention gives is checked each time."""
    method = value if isinstance(value, Method) else Method(where, mix=value, source="own code")
    if not callable(method.mix) and method is not value:
        raise Problem(f"{where}: is a {type(value).__name__}, expected a Method or a function Controls -> Attend")
    return replace(method, mix=checked(method.mix, where)) if callable(method.mix) else method


def checked(function: Callable, where: str) -> Callable:
    """A `mix` whose attention's results are checked: torch would silently broadcast a single row or query over all of
    them, and a NaN would be blamed on what comes after."""
    def mix(controls):
        made, look_at = function(controls), cache(partial(_looked_at, where=where))  # once for rows that share it
        if isinstance(made, list):
            return [row._replace(attend=look_at(row.attend)) for row in made]
        return tuple(map(look_at, made)) if isinstance(made, tuple) else look_at(made)
    return mix


def _looked_at(attend: Callable, where: str) -> Callable:
    if not callable(attend):
        raise Problem(f"{where}: returned {type(attend).__name__}, expected a function (q, k, v, site) -> y")

    def attend_own(q, k, v, site):
        y = attend(q, k, v, site)
        expected = (*q.shape[:3], v.shape[3])
        if getattr(y, "shape", None) != expected:
            given = tuple(y.shape) if hasattr(y, "shape") else f"a {type(y).__name__}"
            raise Problem(f"{where}: gave {given} at {site.name}, expected {expected}, the shape of q")
        if y.device.type == "cpu" and not y.isfinite().all():  # a GPU would be waited for in every layer
            raise Problem(f"{where}: gave inf or NaN at {site.name}; look for a division or log of 0 in it")
        return y
    return attend_own


# ---- its failures ------------------------------------------------------------------------------------------------

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
