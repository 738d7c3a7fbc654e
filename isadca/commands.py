"""What the command line's commands do. Each writes its file whole and prints the path."""

import os
import sys
from argparse import Namespace
from dataclasses import fields, replace
from importlib.util import module_from_spec, spec_from_file_location
from math import prod
from pathlib import Path
from textwrap import fill
from time import perf_counter

import torch
from PIL import ImageChops
from tqdm import tqdm

from .config import Problem
from .images import contact_sheet, load_image, psnr, read_recipe, save_png
from .loading import default_weights, load, parts_of
from .methods import PRESETS, Method, method_named, parse_lam
from .recipe import check_same, fingerprint, hash_files, make_recipe
from .reference import Reference, load_reference, reconstruct as run_back, save_reference
from .reference import invert as run_inversion
from .variation import Run, decode, sample

FITTED = {"crop": "its centre is used (or: --fit squash, --fit pad)", "squash": "it is distorted to a square",
          "pad": "it gets white borders"}
CLOSE, CLOSE_ELSEWHERE = 1, 16  # grey levels; on CPUs float32 gave 0 (float64 too), float16 1, bfloat16 6
DIVERSITY_OF_MANY = 0.3  # where every seed would give the same picture


def vary(args: Namespace) -> None:
    if args.ref is None or args.prompt is None:
        raise Problem('vary needs REF and PROMPT, or --recipe; see isadca vary --help')
    out = _writable(args.out, ".png", args.ref)
    sheet = _writable(Path(args.grid), ".png", args.ref) if args.grid else None
    if sheet == out:
        raise Problem(f"--grid and -o are both {out}; choose another --grid")
    seeds = _seeds(args)
    method = _many(args, _method(args, parse_lam(str(args.lam)) if args.lam is not None else None))
    session = Session(args)
    [z] = session.sample([Run(session.prompt(args.prompt), method, seeds, args.negative)])
    pictures = decode(session.model, z)
    for seed, picture in zip(seeds, pictures):
        path = out if len(seeds) == 1 else out.with_stem(f"{out.stem}-{seed}")
        save_png(picture, path, session.recipe(n=1, seed=seed, diversity=method.diversity))
        print(path)
    if sheet:
        columns = ["reference", *(f"seed {seed}" for seed in seeds)]
        save_png(contact_sheet([[session.ref.image, *pictures]], columns, [args.prompt]), sheet, session.recipe())
        print(sheet)


def sweep(args: Namespace) -> None:
    """All λ, prompts and seeds as runs side by side: the reference is inverted once and replayed once."""
    out = _writable(args.out, ".png", args.ref)
    lams = [parse_lam(text) for text in args.lam.split(",")]
    seeds = _seeds(args)
    method = _many(args, _method(args))
    session = Session(args)
    runs = [Run(session.prompt(prompt), replace(method, lam=lam), seeds, args.negative)
            for prompt in args.prompts for lam in lams]
    pictures = [decode(session.model, z) for z in session.sample(runs)]
    left = [session.ref.image, run_back(session.model, session.ref, progress=session.progress)]
    by_prompt = [pictures[i: i + len(lams)] for i in range(0, len(pictures), len(lams))]
    rows = [left + [column[j] for column in block] for block in by_prompt for j in range(len(seeds))]
    labels = [prompt + (f", seed {seed}" if len(seeds) > 1 else "") for prompt in args.prompts for seed in seeds]
    columns = ["reference", "reconstruction", *(f"lambda {text}" for text in args.lam.split(","))]
    save_png(contact_sheet(rows, columns, labels), out, session.recipe())
    print(out)


def reconstruct(args: Namespace) -> None:
    out = _writable(args.out, ".png", args.ref)
    session = Session(args)
    picture = run_back(session.model, session.ref, progress=session.progress)
    save_png(picture, out, session.recipe())
    print(f"PSNR {psnr(picture, session.ref.image):.2f} dB", file=sys.stderr)
    print(out)


def invert(args: Namespace) -> None:
    out = _writable(args.out, ".safetensors")
    session = Session(args)
    save_reference(session.ref, out, fingerprint(session.hashes.result()))
    print(out)


def inspect(args: Namespace) -> None:
    """One line a part; raises the first Problem after the paths before it were printed."""
    for path in args.paths:
        for part in parts_of(path):
            count = sum(prod(shape) for shape in part.shapes.values())
            dtypes = "/".join(sorted(set(part.dtypes.values())))
            print(f"{part.path}: {part.kind}, layout {part.layout}, {len(part.shapes)} tensors, "
                  f"{count / 1e6:.1f} M parameters, {dtypes}, {part.path.stat().st_size / 1e6:.1f} MB; loads")


def check(args: Namespace) -> None:
    """The demo's cat as a lemon, in few steps, against the stored picture; see CLOSE."""
    start, folder = perf_counter(), default_weights()
    stored, cat = folder / "check.png", folder / "references" / "cat.png"
    model = load(device=args.device, dtype=args.dtype)
    hashes = hash_files(model.files).result()
    [picture] = decode(model, sample(model, run_inversion(model, load_image(cat), steps=10), [Run("a lemon")])[0])
    where = str(model.device), str(model.dtype).removeprefix("torch.")
    if args.renew:
        save_png(picture, stored, make_recipe({"command": "check"}, cat, hashes, *where))
        return print(stored)
    if read_recipe(stored).get("weights_sha256") != hashes:
        raise Problem(f"{stored}: was made with other demo weights; install isadca anew, or after training: "
                      "isadca check --renew")
    apart = max(high for _, high in ImageChops.difference(picture, load_image(stored)).getextrema())
    close = CLOSE if where == ("cpu", "float32") else CLOSE_ELSEWHERE
    found = f"{apart} grey levels from {stored} at most, {close} allowed on {' in '.join(where)}"
    if apart > close:
        raise Problem(f"another picture: {found}; try --device cpu --dtype fp32, or another version of torch")
    print(f"OK: {found}; {perf_counter() - start:.0f} s")


def methods(args: Namespace) -> None:
    for method in PRESETS.values():
        print(f"{method.name}: {method.source}")
        values = [f"{f.name}={getattr(method, f.name)}" for f in fields(method) if f.name not in ("name", "source")]
        print(fill(", ".join(values), 100, initial_indent="    ", subsequent_indent="    "))


class Session:
    """A loaded model and an inverted reference, as the flags ask for them."""

    def __init__(self, args: Namespace):
        self.args = args
        self.reference_path = Path(args.ref)
        saved = self.reference_path.suffix == ".safetensors"
        picture = None if saved else load_image(self.reference_path, note)  # fail before the slow part
        if picture and picture.width != picture.height:
            note(f"{args.ref} is {picture.width}×{picture.height}; {FITTED[args.fit or 'crop']}")
        self.model = load(args.weights, args.ip_adapter, args.image_encoder, args.vae, args.device, args.dtype)
        self.hashes = hash_files(self.model.files)
        if getattr(args, "recipe_source", None):
            check_same(args.recipe_source, args.recipe, self.reference_path, self.hashes.result())
        if saved:
            self.ref = self._saved()
        else:
            self.ref = run_inversion(self.model, picture, 50 if args.steps is None else args.steps,
                                     self.prompt(args.ref_prompt), args.size, progress=self.progress,
                                     fit_by=args.fit or "crop")

    def _saved(self) -> Reference:
        ref = load_reference(self.reference_path, fingerprint(self.hashes.result()), self.model.device)
        for flag, asked, has in [("--steps", self.args.steps, ref.steps), ("--size", self.args.size, ref.image.width),
                                 ("--ref-prompt", self.args.ref_prompt or None, ref.prompt),
                                 ("--fit", self.args.fit, "its own")]:
            if asked not in (None, has):
                raise Problem(f"{flag} is {asked}, but {self.reference_path} was inverted with {has}; leave the flag "
                              "out or invert the picture again")
        return ref

    def sample(self, runs: list[Run]) -> list[torch.Tensor]:
        if self.model.ip_adapter is None and any(run.method.wants_image for run in runs):
            note("no IP-Adapter: the DCA branch sees the text alone")
        return sample(self.model, self.ref, runs, progress=self.progress, at_once=self.args.replay_at_once,
                      rows_at_once=self.args.rows_at_once)

    def prompt(self, text: str) -> str:
        cut = self.model.tokenizer.cut(text)
        if cut:
            short = cut if len(cut) < 80 else f"{cut[:48]} ... {cut[-24:]}"
            note(f"the prompt is longer than {self.model.tokenizer.max_tokens} tokens; not used: {short!r}")
        return text

    def progress(self, items: list, label: str):
        return tqdm(items, desc=label, disable=self.args.quiet, file=sys.stderr)

    def recipe(self, **changes) -> dict:
        model = self.model
        return make_recipe(vars(self.args) | changes, self.reference_path, self.hashes.result(), str(model.device),
                           str(model.dtype).removeprefix("torch."))


def _method(args: Namespace, lam=None) -> Method:
    """The preset with the flags that were given."""
    attend = getattr(args, "attend", None)
    layers = tuple(args.layers) if args.layers is not None else None
    return method_named(args.method, lam=lam, mix=_function(attend) if attend else args.mix,
                        guidance=args.guidance, k=args.k, t_start=args.t_start, layers=layers,
                        replace_above=args.replace_above, adain_above=args.adain_above, ip_scale=args.ip_scale,
                        init=args.init, diversity=args.diversity).check(1000)


def _many(args: Namespace, method: Method) -> Method:
    """Several pictures of a deterministic method would be one picture: give it some fresh noise, and say so."""
    if args.n > 1 and method.deterministic:
        note(f"with --init inverted every seed gives the same picture; using --diversity {DIVERSITY_OF_MANY} "
             "(--init shuffle and --init random differ more)")
        return replace(method, diversity=DIVERSITY_OF_MANY)
    return method


def _seeds(args: Namespace) -> tuple[int, ...]:
    for flag, value in [("--n", args.n), ("--rows-at-once", args.rows_at_once), ("--replay-at-once",
                                                                                args.replay_at_once)]:
        if value < 1:
            raise Problem(f"{flag} is {value}, expected 1 or more")
    if not 0 <= args.seed < 2**62:
        raise Problem(f"--seed is {args.seed}, expected 0 to 2^62")
    return tuple(range(args.seed, args.seed + args.n))


def _function(where: str):
    """FILE.py:NAME -> the function."""
    file, _, name = where.rpartition(":")
    if not file or not Path(file).is_file():
        raise Problem(f"--attend is {where!r}, expected FILE.py:NAME, such as examples/my_attention.py:my_attention")
    spec = spec_from_file_location(Path(file).stem, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise Problem(f"{file}: has no function {name!r}")
    return getattr(module, name)


def _writable(path: Path, suffix: str, ref: str | None = None) -> Path:
    """`path`, if a file can be written there: found out before the work, not after."""
    if path.suffix.lower() != suffix:
        raise Problem(f"{path}: expected a name that ends in {suffix}")
    if path.is_dir():
        raise Problem(f"{path}: is a folder, expected a file name")
    if not path.parent.is_dir():
        raise Problem(f"{path}: the folder {path.parent} does not exist; make it first")
    if ref and path.resolve() == Path(ref).resolve():
        raise Problem(f"{path}: is the reference itself; choose another -o")
    if not os.access(path.parent, os.W_OK):
        raise Problem(f"{path}: the folder {path.parent} is not writable; choose another -o")
    return path


def note(message: str) -> None:
    print(f"isadca: note: {message}", file=sys.stderr)
