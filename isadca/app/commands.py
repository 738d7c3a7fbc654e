"""The commands that write a file: vary, sweep, explore, reconstruct, invert, convert. Each writes it whole and prints
the path."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from ..common.files import save_text
from ..common.images import FORMATS, save_png
from ..common.problem import Problem
from ..common.sheets import contact_sheet
from ..loop import Run, decode
from ..methods import Method
from ..reference import reconstruct as without_control
from .console import log, note, say
from .flags import parse_lam
from .paths import writable
from .recipe import read_recipe
from .saved_reference import save_reference
from .session import Picture, Session, method_of, opened, seeds_of


def vary(args: Namespace) -> None:
    seeds = seeds_of(args)
    lam = None if args.lam is None else parse_lam(args.lam)
    if args.log:
        writable(args.log, args.log.suffix.lower(), args, "--log")
    several = len(args.refs) > 1 or Path(args.refs[0]).is_dir()
    if args.out.is_dir() or several and not args.out.suffix:
        return _vary_all(args, _in_folders(args.refs), method_of(args, lam), seeds)
    [ref] = _one(args.refs, args.out)
    outs = _numbered(args, args.out, seeds)
    method, picture = method_of(args, lam), Picture(ref, args.fit)
    _vary(Session(args), picture, method, dict(zip(seeds, outs)))


def _vary_all(args: Namespace, refs: list[str], method: Method, seeds: tuple[int, ...]) -> None:
    """One load of the model and one bar for all; a reference that fails is named, and the others go on."""
    if args.grid:
        raise Problem("--grid is of one reference; leave it out for a folder")
    failed, session = 0, Session(args)
    args.out.mkdir(exist_ok=True)
    bar, args.quiet = session.progress(refs, "pictures"), True
    for ref in bar:
        try:
            outs = _numbered(args, args.out / f"{Path(ref).stem}.png", seeds)
            _vary(session, Picture(ref, args.fit), method, dict(zip(seeds, outs)), folder=True)
        except Problem as problem:
            say(str(problem))
            failed += 1
    if failed:
        raise Problem(f"{failed} of {len(refs)} references failed, named above; mend them and run it again, what is "
                      "made is kept")


def _vary(session: Session, picture: Picture, method: Method, outs: dict[int, Path], folder: bool = False) -> None:
    """The pictures of one reference, one per seed. In a folder, what is already there is kept."""
    args, began = session.args, perf_counter()
    session.picture, args.ref = picture, str(picture.path)

    def recipe(seed: int) -> dict:
        return session.recipe(n=1, seed=seed, diversity=method.diversity) | {"batch": len(outs)}
    if folder:
        outs = {seed: path for seed, path in outs.items() if not _there(path, recipe(seed), args.overwrite)}
    if not outs:
        return
    session.open(picture)
    runs = [Run(session.prompt(args.prompt), method, tuple(outs), session.prompt(args.negative))]
    pictures = decode(session.model, session.sample(runs)[0])
    for (seed, path), image in zip(outs.items(), pictures):
        save_png(image, path, recipe(seed))
        log(args.log, picture=str(path), reference=args.ref, prompt=args.prompt, seed=seed,
            seconds=round(perf_counter() - began, 3))
        print(path)
    if args.grid:
        columns = ["reference", *(f"seed {seed}" for seed in outs)]
        save_png(contact_sheet([[session.ref.image, *pictures]], columns, [args.prompt]), args.grid, session.recipe())
        print(args.grid)


def _one(refs: list[str], out: Path) -> list[str]:
    """The reference, if there is only one."""
    if len(refs) == 1 and not Path(refs[0]).is_dir():
        return refs
    raise Problem(f"{out}: is one file, but REF is {', '.join(refs)}; give one REF and a PROMPT in quotes, or a folder "
                  "with -o")


def _in_folders(refs: list[str]) -> list[str]:
    """Every picture among the references, including those inside folders."""
    kinds = {f".{kind.lower()}" for kind in FORMATS} | {".jpg", ".tif", ".safetensors"}
    found = [[str(path) for path in sorted(Path(ref).iterdir()) if path.suffix.lower() in kinds]
             if Path(ref).is_dir() else [ref] for ref in refs]
    if [] in found:
        raise Problem(f"{refs[found.index([])]}: no pictures in it, expected {', '.join(FORMATS)}")
    stems = [Path(path).stem for path in sum(found, [])]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise Problem(f"two references are called {twice}, and so would be their pictures; rename one")
    return sum(found, [])


def _there(path: Path, recipe: dict, overwrite: bool) -> bool:
    """Whether to leave `path` alone: it has this recipe already, or another one that may not be overwritten."""
    if not path.exists():
        return False
    try:
        before = read_recipe(path)
    except Problem:
        before = {}
    same = all(before.get(key) == recipe[key] for key in ("args", "reference_sha256", "weights_sha256"))
    if same or not overwrite:
        note(f"{path}: {'is there' if same else 'has another recipe and is left; --overwrite replaces it'}")
    return same or not overwrite


def _numbered(args: Namespace, out: Path, seeds: tuple[int, ...]) -> list[Path]:
    """The files that will be written, checked before the work, and so is the sheet of --grid."""
    outs = [out] if len(seeds) == 1 else [out.with_stem(f"{out.stem}-{seed}") for seed in seeds]
    for path in outs:
        writable(path, ".png", args)
    if args.grid and writable(args.grid, ".png", args, "--grid") in [out, *outs]:
        raise Problem(f"--grid and -o are both {args.grid}; choose another --grid")
    return outs


def sweep(args: Namespace) -> None:
    """All λ, prompts and seeds as runs side by side: the reference is inverted once and replayed once."""
    out = writable(args.out, ".png", args)
    lams = [parse_lam(text) for text in args.lam.split(",")]
    seeds, method = seeds_of(args), method_of(args)
    session = opened(args)
    negative = session.prompt(args.negative)
    runs = [Run(session.prompt(prompt), replace(method, lam=lam), seeds, negative)
            for prompt in args.prompts for lam in lams]
    pictures = [decode(session.model, z) for z in session.sample(runs)]
    left = [session.ref.image, without_control(session.model, session.ref, progress=session.progress)]
    by_prompt = [pictures[i: i + len(lams)] for i in range(0, len(pictures), len(lams))]
    rows = [left + [column[j] for column in block] for block in by_prompt for j in range(len(seeds))]
    labels = [prompt + (f", seed {seed}" if len(seeds) > 1 else "") for prompt in args.prompts for seed in seeds]
    columns = ["reference", "reconstruction", *(f"lambda {text}" for text in args.lam.split(","))]
    save_png(contact_sheet(rows, columns, labels), out, session.recipe())
    print(out)


def explore(args: Namespace) -> None:
    from .explore import look_inside, method_at, page
    out = writable(args.out, ".html", args)
    method = method_at(args.lam)
    session = opened(args, steps=20)
    session.tell_missing([method])
    data = look_inside(session.model, session.ref, session.prompt(args.prompt), method, session.progress)
    save_text(page(data), out)
    print(out)


def reconstruct(args: Namespace) -> None:
    from ..evaluation.metrics import psnr
    out = writable(args.out, ".png", args)
    session = opened(args)
    image = without_control(session.model, session.ref, progress=session.progress)
    save_png(image, out, session.recipe())
    print(f"PSNR {psnr(image, session.ref.image):.2f} dB", file=sys.stderr)
    print(out)


def invert(args: Namespace) -> None:
    out = writable(args.out, ".safetensors", args)
    session = opened(args)
    save_reference(session.ref, out, session.made_with())
    print(out)


def convert(args: Namespace) -> None:
    from .convert import convert as convert_file
    left_out = convert_file(args.source, writable(args.out, ".safetensors", args))
    if left_out:
        note(f"{len(left_out)} left out, no tensors or not the adapter's: {', '.join(left_out[:3])}"
             + (", ..." if len(left_out) > 3 else ""))
    print(args.out)
