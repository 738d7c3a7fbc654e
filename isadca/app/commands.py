"""The commands that make pictures: vary, sweep, explore, reconstruct, invert. Each writes its file whole and prints
the path. The other commands are in tools.py."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..common.files import save_text
from ..common.images import load_image, save_png
from ..common.own_code import is_own
from ..common.problem import Problem
from ..common.sheets import contact_sheet
from ..evaluation.metrics import psnr
from ..loading.load import load, pick_file
from ..loop import Run, decode, sample
from ..methods import Method, method_named, own_method
from ..reference import Reference, invert as run_inversion, reconstruct as run_back
from .cli import parse_lam
from .explore import look_inside, method_at, page
from .recipe import check_same, fingerprint, hash_files, make_recipe
from .saved_reference import load_reference, save_reference

FITTED = {"crop": "its centre is used (or: --fit squash, --fit pad)", "squash": "it is distorted to a square",
          "pad": "it gets white borders"}
DIVERSITY_OF_MANY = 0.3  # where every seed would give the same picture


def vary(args: Namespace) -> None:
    if args.ref is None or args.prompt is None:
        raise Problem('vary needs REF and PROMPT, or --recipe; see isadca vary --help')
    out = writable(args.out, ".png", args.ref)
    sheet = writable(Path(args.grid), ".png", args.ref) if args.grid else None
    if sheet == out:
        raise Problem(f"--grid and -o are both {out}; choose another --grid")
    seeds = _seeds(args)
    method = _many(args, _method(args, parse_lam(str(args.lam)) if args.lam is not None else None))
    session = Session(args)
    [z] = session.sample([Run(session.prompt(args.prompt), method, seeds, args.negative)], session.expected())
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
    out = writable(args.out, ".png", args.ref)
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


def explore(args: Namespace) -> None:
    out = writable(args.out, ".html")
    method = method_at(args.lam)
    session = Session(args, steps=20)
    session.tell_missing([method])
    data = look_inside(session.model, session.ref, session.prompt(args.prompt), method, session.progress)
    save_text(page(data), out)
    print(out)


def reconstruct(args: Namespace) -> None:
    out = writable(args.out, ".png", args.ref)
    session = Session(args)
    picture = run_back(session.model, session.ref, progress=session.progress)
    save_png(picture, out, session.recipe())
    print(f"PSNR {psnr(picture, session.ref.image):.2f} dB", file=sys.stderr)
    print(out)


def invert(args: Namespace) -> None:
    out = writable(args.out, ".safetensors")
    session = Session(args)
    save_reference(session.ref, out, fingerprint(session.hashes.result()))
    print(out)


class Session:
    """A loaded model and an inverted reference, as the flags ask for them."""

    def __init__(self, args: Namespace, steps: int = 50):
        self.args = args
        self.reference_path = Path(args.ref)
        saved = self.reference_path.suffix == ".safetensors"
        picture = None if saved else load_image(self.reference_path, note)  # fail before the slow part
        if picture and picture.width != picture.height:
            note(f"{args.ref} is {picture.width}×{picture.height}; {FITTED[args.fit or 'crop']}")
        self._load(getattr(args, "prior", None))
        if getattr(args, "recipe_source", None):
            check_same(args.recipe_source, args.recipe, self.reference_path, self.hashes.result() | args.own_code)
        if saved:
            self.ref = self._saved()
        else:
            self.ref = run_inversion(self.model, picture, steps if args.steps is None else args.steps,
                                     self.prompt(args.ref_prompt), args.size, progress=self.progress,
                                     fit_by=args.fit or "crop")

    def _load(self, prior: str | None) -> None:
        """With a prior, which says what the image branch sees, no image encoder is needed."""
        args, more = self.args, {}
        encoder = args.image_encoder or ("none" if prior else None)
        self.model = load(args.weights, args.ip_adapter, encoder, args.vae, args.device, args.dtype)
        self.prior = None
        if prior:
            from ..evaluation.load_others import load_prior
            self.prior = load_prior(prior, self.model.dtype, self.model.device)
            more = {"prior": pick_file(Path(prior, "prior"), self.model.dtype)}
        self.hashes = hash_files(self.model.files | more)

    def _saved(self) -> Reference:
        ref = load_reference(self.reference_path, fingerprint(self.hashes.result()), self.model.device)
        for flag, asked, has in [("--steps", self.args.steps, ref.steps), ("--size", self.args.size, ref.image.width),
                                 ("--ref-prompt", self.args.ref_prompt or None, ref.prompt),
                                 ("--fit", self.args.fit, "its own")]:
            if asked not in (None, has):
                raise Problem(f"{flag} is {asked}, but {self.reference_path} was inverted with {has}; leave the flag "
                              "out or invert the picture again")
        return ref

    def expected(self) -> torch.Tensor | None:
        """The image embedding that the prior expects of the prompt."""
        from ..evaluation.prior import embed_prompt
        return embed_prompt(*self.prior, self.args.prompt, seed=self.args.seed) if self.prior else None

    def tell_missing(self, methods: Iterable[Method]) -> None:
        if self.model.ip_adapter is None and any(method.wants_image for method in methods):
            note("no IP-Adapter: the DCA branch sees the text alone")

    def sample(self, runs: list[Run], image_embeds: torch.Tensor | None = None) -> list[torch.Tensor]:
        self.tell_missing(run.method for run in runs)
        return sample(self.model, self.ref, runs, progress=self.progress, at_once=self.args.replay_at_once,
                      rows_at_once=self.args.rows_at_once, image_embeds=image_embeds)

    def prompt(self, text: str) -> str:
        cut = self.model.tokenizer.cut(text)
        if cut:
            short = cut if len(cut) < 80 else f"{cut[:48]} ... {cut[-24:]}"
            note(f"the prompt is longer than {self.model.tokenizer.max_tokens} tokens; not used: {short!r}")
        return text

    def progress(self, items: list, label: str):
        return tqdm(items, desc=label, disable=self.args.quiet, file=sys.stderr)

    def recipe(self, **changes) -> dict:
        model, hashes = self.model, self.hashes.result() | getattr(self.args, "own_code", {})
        return make_recipe(vars(self.args) | changes, self.reference_path, hashes, str(model.device),
                           str(model.dtype).removeprefix("torch."))


def _method(args: Namespace, lam=None) -> Method:
    """The preset, or the user's own method, with the flags that were given. `args.own_code`: sha256 by flag."""
    args.own_code, mix = {}, args.mix
    name = args.method or "isadca"
    base = method_named(name) if not is_own(name) else None
    if base is None:
        base, args.own_code["--method"] = own_method(args.method)
    if attend := getattr(args, "attend", None):
        own, args.own_code["--attend"] = own_method(attend, "--attend")
        mix = own.mix
    given = dict(lam=lam, mix=mix, guidance=args.guidance, k=args.k, t_start=args.t_start,
                 layers=tuple(args.layers) if args.layers is not None else None, replace_above=args.replace_above,
                 adain_above=args.adain_above, ip_scale=args.ip_scale, init=args.init, diversity=args.diversity)
    method = replace(base, **{field: value for field, value in given.items() if value is not None})
    idle = [f"--{name.replace('_', '-')}" for name in ("mix", "layers", "replace_above") if given[name] is not None
            and not (name == "mix" and mix is not args.mix and args.mix is None)]
    if callable(method.mix) and idle:
        note(f"{', '.join(idle)} has no effect: your own attention decides that")
    return method.check(1000)


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


def writable(path: Path, suffix: str, ref: str | None = None) -> Path:
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
