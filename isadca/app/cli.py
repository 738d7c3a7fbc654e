"""The command line: turns what was typed into a command, and whatever happens into one line and an exit code.

Paths of what was written go to standard output, everything else to standard error. Exit codes: 0, 2 for a problem
that the user can mend (one line says which), 130 when interrupted. Heavy imports wait until a command runs.
"""

import argparse
import gc
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

from ..common.problem import Problem
from .console import Steady, say
from .flags import Parser, parser
from .paths import check_inputs

ROOMS = {"evaluate": "evaluate", "inspect": "inspect", "methods": "inspect", "check": "check", "fetch": "fetch",
         "completion": "completion"}


def main(argv: list[str] | None = None) -> int:
    out, err = Steady(sys.stdout), Steady(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        code = _guarded(argv)
        out.flush()
        err.flush()
        if out.error and not isinstance(out.error, BrokenPipeError):  # `| head` just wanted no more
            reason = getattr(out.error, "strerror", None) or out.error
            code = code or _fail(f"standard output: {reason}; mend that and run it again")
    for name, stream in (("stdout", out), ("stderr", err)):
        if stream.error:
            setattr(sys, name, open(os.devnull, "w"))  # or Python complains once more at its end
    return code


def _guarded(argv: list[str] | None) -> int:
    try:
        args = _read(sys.argv[1:] if argv is None else argv)
        room = import_module(f".{ROOMS.get(args.command, 'commands')}", __package__)
        if argv is None:  # a process of its own: no collection need pass over torch's objects, 0.35 s of a command
            gc.freeze()
        getattr(room, args.command)(args)
        return 0
    except Problem as problem:
        return _fail(str(problem))
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    """The exit code of an error in the user's own code, of the system, or of memory. Raises again what is isadca's."""
    short = isinstance(error, RuntimeError) and re.search("(out of|enough|allocate) memory", str(error))
    if short or isinstance(error, MemoryError):
        return _fail("out of memory; try --rows-at-once 4, --replay-at-once 1, --dtype fp16 or a smaller --size")
    from .own_code import own_failure
    if own := own_failure(error):
        print(own[0], file=sys.stderr, end="")
        return _fail(own[1])
    if isinstance(error, OSError):  # a file went away
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}; mend that and run it again")
    raise error


def _fail(message: str) -> int:
    say(message)
    return 2


def _read(argv: list[str]) -> argparse.Namespace:
    top, commands = parser()
    if not argv or argv[0] not in commands:
        args = top.parse_args(argv)  # --help, --version, or what is wrong
    else:
        args = commands[argv[0]].parse_intermixed_args(argv[1:])
    if args.command == "vary":
        typed = args.words
        args = _again(args, commands["vary"], argv) if args.recipe else args
        if len(args.words) < 2 or args.out is None:
            raise Problem("vary needs REF and PROMPT, or --recipe, and -o OUT; see isadca vary --help")
        *args.refs, args.prompt = args.words
        # a recipe's prompt is a prompt, whatever it ends in: no picture makes this read a file
        args.prompts_file = args.prompt if len(typed) > 1 and args.prompt.lower().endswith(".txt") else None
        del args.words
    check_inputs(args)
    return args


def _again(given: argparse.Namespace, vary: Parser, argv: list[str]) -> argparse.Namespace:
    """The recipe's arguments, read as if they had been typed before those that were given."""
    from .own_code import is_own
    from .recipe import read_recipe, recipe_flags
    check_inputs(given)
    source = Path(given.recipe)
    recipe = read_recipe(source)
    words, flags = recipe_flags(recipe, "vary", source)
    try:
        args = vary.parse_intermixed_args([*flags, *argv[1:]])
    except Problem as problem:
        raise Problem(f"{source}: its recipe is damaged or of another version: {problem}") from None
    args.words += words[len(args.words):]
    if len(given.words) == 1 and not Path(given.words[0]).exists():
        raise Problem(f"{given.words[0]}: no such picture; for another prompt give REF and PROMPT")
    if is_own(args.method or "") and not given.method:
        raise Problem(f"{source}: was made with --method {args.method}; give the flag again to run that code")
    args.recipe_source = recipe if not given.words and given.weights is None else None  # what is to be verified
    return args
