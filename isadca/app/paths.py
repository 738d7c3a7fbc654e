"""Inputs and outputs, checked before the work: no output replaces an input, and nothing waits for a pipe."""

import os
import stat
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.files import try_write
from ..common.problem import Problem

INPUTS = ("ref", "refs", "recipe", "weights", "vae", "ip_adapter", "image_encoder", "pairs", "source", "paths",
          "mask", "keep", "also", "prompts_file")


def inputs(args: Namespace) -> Iterator[tuple[str, str]]:
    """(what it is called, path) of every file and folder that the flags name."""
    for name in INPUTS:
        value = getattr(args, name, None)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not (str(path) == "none" and name in ("ip_adapter", "image_encoder")):
                flag = {"ref": "REF", "refs": "REF", "source": "FILE", "pairs": "PAIRS", "paths": "PATH",
                        "prompts_file": "PROMPT"}.get(name)
                yield flag or f"--{name.replace('_', '-')}", str(path)
    if file := (getattr(args, "method", None) or "").rpartition(":")[0]:  # FILE.py:NAME
        yield "--method", file


def check_inputs(args: Namespace) -> None:
    for flag, path in inputs(args):
        if path in ("", ".") and flag != "PATH" and flag != "REF" or not path or "\0" in path:
            raise Problem(f"{flag} is {path!r}, expected a path; leave it out or name a file or folder")
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue  # who reads it says why
        except ValueError:  # half of a surrogate pair, from a forged recipe
            raise Problem(f"{flag} is {path!r}, which can be no path; give another") from None
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise Problem(f"{path}: is a pipe or a device, expected a file or folder; copy what it gives to a file")


def writable(path: Path, suffix: str | tuple[str, ...], args: Namespace, flag: str = "-o") -> Path:
    """`path`, if a file can be written there without replacing an input: checked before the work, not after."""
    another = f"choose another {flag}"
    suffixes = suffix if isinstance(suffix, tuple) else (suffix,)
    if path.suffix.lower() not in suffixes:
        raise Problem(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if "\0" in str(path):
        raise Problem(f"{str(path)!r}: holds a NUL; {another}")
    if path.is_dir():
        raise Problem(f"{path}: is a folder, expected a file name")
    if not path.parent.is_dir():
        raise Problem(f"{path}: the folder {path.parent} does not exist; make it first")
    for name, read in inputs(args):
        if path.exists() and os.path.exists(read) and path.samefile(read):  # by whatever name: links, case
            what = "the reference itself" if name == "REF" else f"what {name} names"
            raise Problem(f"{path}: is {what}; {another}")
        inside = os.path.isdir(read) and Path(os.path.realpath(read)) in Path(os.path.realpath(path)).parents
        if inside and suffix == ".safetensors" and path.exists():
            raise Problem(f"{path}: is a file of {name} {read}; {another}")
    if not os.access(path.parent, os.W_OK):
        raise Problem(f"{path}: the folder {path.parent} is not writable; {another}")
    try_write(path)
    return path


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """A folder for outputs. A new one is taken away again, not its parents, where the block raises a Problem."""
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"{path}: no folder can be made there ({error.strerror}); choose another -o") from None
    try:
        yield
    except Problem:
        if new:
            path.rmdir()
        raise


def prompts_of(path: str) -> list[str]:
    """The lines of a text file, without blank ones and comments. Raises Problem."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise Problem(f"{path}: no file of prompts ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise Problem(f"{path}: is no text in UTF-8; save the prompts as that") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise Problem(f"{path}: no prompts in it, expected one a line")
    return prompts
