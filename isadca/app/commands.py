"""The commands that write a file: vary, sweep, explore, reconstruct, invert, convert. Each writes it whole and prints
the path."""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter

from ..common.files import PICTURES, save_png, save_text
from ..common.images import FORMATS
from ..common.problem import Problem
from ..common.sheets import contact_sheet
from ..loop import Run, decode
from ..methods import Method, method_named
from ..reference import reconstruct as without_control
from .console import log, note, say
from .flags import parse_lam
from .own_code import is_own, own_method
from .paths import INPUTS, made_folder, prompts_of, writable
from .recipe import read_recipe
from .saved_reference import is_reference, save_reference
from .session import Picture, Session, method_of

Outs = dict[str, dict[int, Path]]  # of one reference: prompt -> seed -> output


def vary(args: Namespace) -> None:
    """Loads the model once for all pictures. In a folder, a reference that fails is named, and the others go on."""
    lam = None if args.lam is None else parse_lam(args.lam)
    prompts = prompts_of(args.prompts_file) if args.prompts_file else [args.prompt]
    several = len(args.refs) > 1 or Path(args.refs[0]).is_dir() or args.prompts_file is not None
    if args.out.is_dir() or several and args.out.suffix.lower() != ".png":
        return _vary_all(args, method_of(args, lam), _in_folder(args, prompts))
    if several:
        raise Problem(f"{args.out}: is one file, but REF is {', '.join(args.refs)} and PROMPT {args.prompt}; give one "
                      "REF and a PROMPT in quotes, or a folder with -o")
    outs = {args.prompt: _numbered(args, args.out)}
    _check_beside(args, [outs])
    method, picture = method_of(args, lam), Picture(args.refs[0])
    _vary(Session(args, [method], samplings=1), picture, method, outs)


def _vary_all(args: Namespace, method: Method, jobs: dict[str, dict[str, Path]]) -> None:
    """What is there already is found before the work, so that the start line and the bar are of what is to do."""
    if args.grid:
        raise Problem("--grid is of one reference; leave it out for a folder")
    with made_folder(args.out):
        numbered = {ref: {prompt: _numbered(args, out) for prompt, out in outs.items()} for ref, outs in jobs.items()}
        _check_beside(args, list(numbered.values()))
    session, failed = Session(args, [method]), 0
    to_do = [(ref, outs) for ref, of_ref in numbered.items() if (outs := _missing(session, ref, method, of_ref))]
    session.job.pictures = sum(len(seeds) for _, outs in to_do for seeds in outs.values())
    for i, (ref, outs) in enumerate(to_do):
        session.job.to_come = {"inverting": len(to_do) - i, "sampling": sum(len(outs) for _, outs in to_do[i:])}
        try:
            _vary(session, Picture(ref), method, outs)
        except Problem as problem:
            say(str(problem))
            failed += 1
    if failed:
        raise Problem(f"{failed} of {len(jobs)} references failed, named above; mend them and run it again, what is "
                      "made is kept")


def _vary(session: Session, picture: Picture, method: Method, outs: Outs) -> None:
    """The pictures of one reference, of each prompt and seed."""
    args = session.args
    for prompt, paths in outs.items():
        args.prompt, began = prompt, perf_counter()
        session.open(picture)
        runs = [Run(session.prompt(args.prompt), method, tuple(paths), session.prompt(args.negative))]
        pictures = decode(session.model, session.sample(runs)[0])
        for (seed, path), image in zip(paths.items(), pictures):
            save_png(image, path, _recipe(session, picture, method, seed) | {"batch": len(paths)})
            log(args.log, picture=str(path), reference=str(picture.path), prompt=args.prompt, seed=seed,
                seconds=round(perf_counter() - began, 3))
            print(path)
        if args.grid:
            columns = ["reference", *(f"seed {seed}" for seed in paths)]
            sheet = contact_sheet([[session.ref.image, *pictures]], columns, [args.prompt])
            save_png(sheet, args.grid, session.recipe(picture))
            print(args.grid)


def _recipe(session: Session, picture: Picture, method: Method, seed: int) -> dict:
    """Of one picture, as if it were made alone."""
    return session.recipe(picture, n=1, seed=seed, diversity=method.diversity)


def _in_folder(args: Namespace, prompts: list[str]) -> dict[str, dict[str, Path]]:
    """Every picture among the references or inside them -> {prompt: its output}. A file's prompts are in the name."""
    refs: list[Path] = []
    for place in map(Path, args.refs):
        refs += _pictures_in(place, args.out) if place.is_dir() else [place]
    ends = {prompt: "" if prompt == args.prompt else f"-{_words(prompt)}" for prompt in prompts}
    made_from: dict[str, str] = {}
    for ref in refs:
        for prompt, end in ends.items():
            name, source = f"{ref.stem}{end}.png", f"{ref} with {prompt!r}"
            if name in made_from:
                raise Problem(f"two pictures would be called {name}; rename a reference, or reword a prompt: "
                              f"{made_from[name]}, {source}")
            made_from[name] = source
    args.refs = list(map(str, refs))  # so that no output replaces one of them
    return {str(ref): {prompt: args.out / f"{ref.stem}{end}.png" for prompt, end in ends.items()} for ref in refs}


def _pictures_in(folder: Path, out: Path) -> list[Path]:
    """Pictures and saved references, but no hidden files and no weights."""
    if out.is_dir() and out.samefile(folder):
        raise Problem(f"{out}: is the folder of the references; choose another -o")
    found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")
             and (path.suffix.lower() in PICTURES or path.suffix == ".safetensors" and is_reference(path, True))]
    if not found:
        raise Problem(f"{folder}: no pictures in it, expected {', '.join(FORMATS)}")
    return found


def _words(prompt: str) -> str:
    """The part of a file's name that is made from its prompt; a long one is cut and told by its hash."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    return words if len(words) <= 60 else f"{words[:60]}-{sha256(words.encode()).hexdigest()[:6]}"


def _missing(session: Session, ref: str, method: Method, outs: Outs) -> Outs:
    """The pictures of one reference that are to be made."""
    args, left = session.args, {}
    if not any(path.exists() for paths in outs.values() for path in paths.values()):
        return outs
    picture = Picture(ref, read=False)
    for prompt, paths in outs.items():
        args.prompt = prompt
        left[prompt] = {seed: path for seed, path in paths.items()
                        if not _there(path, _recipe(session, picture, method, seed), args.overwrite)}
    return {prompt: paths for prompt, paths in left.items() if paths}


def _there(path: Path, recipe: dict, overwrite: bool) -> bool:
    """Whether to leave `path` alone: it has this recipe already, or another one that may not be overwritten, or none.
    Where the inputs lay does not matter; their sha256 does."""
    if not path.exists():
        return False
    try:
        before = read_recipe(path)
    except Problem:
        note(f"{path}: was not made by isadca and is left; move it, or choose another -o")
        return True
    same = all(_compared(before.get(key)) == _compared(recipe[key])
               for key in ("args", "reference_sha256", "weights_sha256"))
    if same or not overwrite:
        note(f"{path}: {'is there' if same else 'has another recipe and is left; --overwrite replaces it'}")
    return same or not overwrite


def _compared(value: object) -> object:
    return {key: each for key, each in value.items() if key not in INPUTS} if isinstance(value, dict) else value


def _check_beside(args: Namespace, of_refs: list[Outs]) -> None:
    """--log and --preview, before the work: they may be no output."""
    if args.log:
        writable(args.log, (".jsonl", ".json", ".log", ".txt"), args, "--log")
    outs = [args.grid, *(path for outs in of_refs for paths in outs.values() for path in paths.values())]
    if args.preview and writable(args.preview, ".png", args, "--preview") in outs:
        raise Problem(f"--preview and -o or --grid are both {args.preview}; choose another --preview")


def _numbered(args: Namespace, out: Path) -> dict[int, Path]:
    """The output of each seed. All of them, and --grid's sheet, are checked before the work."""
    seeds = range(args.seed, args.seed + args.n)
    outs = {seed: writable(out if args.n == 1 else out.with_stem(f"{out.stem}-{seed}"), ".png", args) for seed in seeds}
    if args.grid and writable(args.grid, ".png", args, "--grid") in [out, *outs.values()]:
        raise Problem(f"--grid and -o are both {args.grid}; choose another --grid")
    return outs


def _opened(args: Namespace, methods: Sequence[Method] = (), samplings: int = 0) -> Session:
    """For the commands of one reference: it is read before the model, so that a bad one is named at once."""
    picture = Picture(args.ref)
    session = Session(args, methods, samplings=samplings)
    session.open(picture)
    return session


def sweep(args: Namespace) -> None:
    """All λ, prompts and seeds as runs side by side: the reference is inverted once and replayed once."""
    out, method = writable(args.out, ".png", args), method_of(args)
    methods = [replace(method, lam=parse_lam(text)) for text in args.lam.split(",")]
    seeds = tuple(range(args.seed, args.seed + args.n))
    session = _opened(args, methods * len(args.prompts), samplings=1)
    negative = session.prompt(args.negative)
    runs = [Run(session.prompt(prompt), each, seeds, negative) for prompt in args.prompts for each in methods]
    pictures = [decode(session.model, z) for z in session.sample(runs)]
    left = [session.ref.image, without_control(session.model, session.ref, progress=session.job.progress)]
    by_prompt = [pictures[i: i + len(methods)] for i in range(0, len(pictures), len(methods))]
    rows = [left + [column[j] for column in block] for block in by_prompt for j in range(len(seeds))]
    labels = [prompt + (f", seed {seed}" if len(seeds) > 1 else "") for prompt in args.prompts for seed in seeds]
    columns = ["reference", "reconstruction", *(f"lambda {text}" for text in args.lam.split(","))]
    save_png(contact_sheet(rows, columns, labels), out, session.recipe(session.picture))
    print(out)


def explore(args: Namespace) -> None:
    from .explore import look_inside, method_at, page
    out = writable(args.out, ".html", args)
    method, beside = method_at(args.lam), [method_named(name) for name in ("rival-edit", "masactrl", "ip-adapter")]
    if args.method is not None:
        own = own_method(args.method)[0] if is_own(args.method) else method_named(args.method)
        beside.append(replace(own, name=own.name.rpartition(":")[2]))
    session = _opened(args, [method, *beside])
    data = look_inside(session.model, session.ref, session.prompt(args.prompt), method, session.job.progress, beside,
                       session.region("keep"))
    package, folder = Path(__file__).resolve().parent.parent, out.resolve().parent
    near = package.parent == folder or package.parent in folder.parents  # page and code in one clone: linked
    save_text(page(data | {"code": Path(os.path.relpath(package, folder)).as_posix() if near else ""}), out)
    print(out)


def reconstruct(args: Namespace) -> None:
    from ..evaluation.metrics import psnr
    out = writable(args.out, ".png", args)
    session = _opened(args)
    image = without_control(session.model, session.ref, progress=session.job.progress)
    save_png(image, out, session.recipe(session.picture))
    print(f"PSNR {psnr(image, session.ref.image):.2f} dB", file=sys.stderr)
    print(out)


def invert(args: Namespace) -> None:
    out = writable(args.out, ".safetensors", args)
    session = _opened(args)
    save_reference(session.ref, out, session.made_with())
    print(out)


def convert(args: Namespace) -> None:
    from .convert import convert as convert_file
    left_out = convert_file(args.source, writable(args.out, ".safetensors", args))
    if left_out:
        note(f"{len(left_out)} left out, no tensors or not the adapter's: {', '.join(left_out[:3])}"
             + (", ..." if len(left_out) > 3 else ""))
    print(args.out)
