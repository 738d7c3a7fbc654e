"""What the commands share: a loaded model, references opened with it, the method and the seeds that the flags ask for.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..common.files import sha256
from ..common.images import fit, load_image
from ..common.problem import Problem
from ..loading.load import default_weights, find_tokenizer, load, pick_file
from ..loop import Run, sample
from ..methods import Method, method_named
from ..reference import Reference, invert
from . import recipe as recipes
from .console import note
from .own_code import is_own, own_method
from .saved_reference import load_reference

FITTED = {"crop": "its centre is used (or: --fit squash, --fit pad)", "squash": "it is distorted to a square",
          "pad": "it gets white borders"}
DIVERSITY_OF_MANY = 0.3  # where every seed would give the same picture
MOST = 10_000  # of whatever is counted


class Picture:
    """A reference's file, read and hashed once, so that the recipe names what was used. A saved one has no image."""

    def __init__(self, path: str, fit: str | None):
        self.path = Path(path)
        saved = self.path.suffix == ".safetensors"
        self.sha256 = sha256(self.path) if self.path.is_file() else ""
        self.image: Image.Image | None = None if saved else load_image(self.path, note)
        if self.image and self.image.width != self.image.height:
            note(f"{path} is {self.image.width}×{self.image.height}; {FITTED[fit or 'crop']}")
        if not saved and sha256(self.path) != self.sha256:
            raise Problem(f"{path}: changed while it was read; run it again")


class Session:
    """A loaded model, as the flags ask for it, and the reference that was opened last."""

    def __init__(self, args: Namespace):
        self.args = args
        prior = getattr(args, "prior", None)
        encoder = args.image_encoder or ("none" if prior else None)  # the prior says what the image branch sees
        self.model = load(args.weights, args.ip_adapter, encoder, args.vae, args.device, args.dtype)
        files, self.prior = dict(self.model.files), None
        if prior:
            from ..loading.prior import load_prior
            self.prior = load_prior(prior, self.model.dtype, self.model.device)
            files["prior"] = pick_file(Path(prior, "prior"), self.model.dtype)
        weights = Path(args.weights or default_weights())
        self._read = {f"--{name}": sha256(Path(path)) for name in ("mask", "keep", "also")
                      if (path := getattr(args, name, None)) and Path(path).is_file()}
        self._hashes = recipes.hash_files(recipes.inputs_of(files, weights, find_tokenizer(weights)))

    @property
    def hashes(self) -> dict[str, str]:
        return self._hashes.result() | self._read | getattr(self.args, "own_code", {})

    def open(self, picture: Picture, steps: int = 50) -> Reference:
        """Invert the picture, or take the saved inversion. Raises Problem where a recipe says it is another."""
        args, self.picture = self.args, picture
        args.ref = str(picture.path)
        if source := getattr(args, "recipe_source", None):
            recipes.check_same(source, args.recipe, picture.path, picture.sha256, self.hashes)
            if other := recipes.made_elsewhere(source, self.recipe() | {"batch": args.n}):
                note(f"{args.recipe} was made with {other}: a pixel may differ by one grey level")
        if picture.image is None:
            self.ref = self._saved()
        else:
            self.ref = self._invert(picture.image, steps if args.steps is None else args.steps, args.size)
        return self.ref

    def _invert(self, image: Image.Image, steps: int, size: int | None) -> Reference:
        args = self.args
        if not 0 <= args.fixed_point <= 100:
            raise Problem(f"--fixed-point is {args.fixed_point}, expected 0 to 100; 1 is a good first try")
        return invert(self.model, image, steps, self.prompt(args.ref_prompt), size, progress=self.progress,
                      fit_by=args.fit or "crop", fixed_point=args.fixed_point)

    def made_with(self) -> str:
        """What an inversion depends on, as a saved reference holds it."""
        return json.dumps(recipes.of_inversion(self.hashes))

    def _saved(self) -> Reference:
        path, args = self.picture.path, self.args
        ref = load_reference(path, self.made_with(), self.model.device)
        side = self.model.check_size(ref.image.width)
        if ref.chain.shape[-1] * self.model.vae.config.downscale != side or sha256(path) != self.picture.sha256:
            raise Problem(f"{path}: a damaged reference; invert the picture again")
        for flag, asked, has in [("--steps", args.steps, ref.steps), ("--size", args.size, ref.image.width),
                                 ("--ref-prompt", args.ref_prompt or None, ref.prompt), ("--fit", args.fit, "its own"),
                                 ("--fixed-point", args.fixed_point or None, "its own")]:
            if asked not in (None, has):
                raise Problem(f"{flag} is {asked}, but {path} was inverted with {has}; leave the flag out or invert "
                              "the picture again")
        return ref

    def sample(self, runs: list[Run]) -> list[torch.Tensor]:
        self.tell_missing(run.method for run in runs)
        embeds = None
        if self.prior:
            from ..networks.prior import embed_prompt
            embeds = embed_prompt(*self.prior, self.args.prompt, seed=self.args.seed)
        args, ref = self.args, self.ref
        also = [self._invert(load_image(args.also, note), ref.steps, ref.image.width)] if args.also else []
        return sample(self.model, ref, runs, progress=self.progress, at_once=args.replay_at_once,
                      rows_at_once=args.rows_at_once, image_embeds=embeds, also=also,
                      mask=self._region(args.mask), keep=self._region(args.keep))

    def _region(self, path: str | None) -> torch.Tensor | None:
        """A picture's brightness, (h,w) from 0 to 1, fitted as the reference was."""
        if path is None:
            return None
        fitted = fit(load_image(path, note), self.ref.image.width, self.args.fit or "crop").convert("L")
        return torch.from_numpy(np.array(fitted)).to(self.model.device) / 255

    def tell_missing(self, methods: Iterable[Method]) -> None:
        if self.model.ip_adapter is None and any(method.wants_image for method in methods):
            note("no IP-Adapter: the DCA branch sees the text alone")

    def prompt(self, text: str) -> str:
        if cut := self.model.tokenizer.cut(text):
            short = cut if len(cut) < 80 else f"{cut[:48]} ... {cut[-24:]}"
            note(f"the prompt is longer than {self.model.tokenizer.max_tokens} tokens; not used: {short!r}")
        return text

    def progress(self, items: list, label: str):
        return tqdm(items, desc=label, disable=self.args.quiet, file=sys.stderr)

    def recipe(self, **changes) -> dict:
        return recipes.make_recipe(vars(self.args) | changes, self.picture.sha256, self.hashes, str(self.model.device),
                                   str(self.model.dtype).removeprefix("torch."))


def opened(args: Namespace, steps: int = 50) -> Session:
    """For the commands of one reference: it is read before the model, so that a bad one is named at once."""
    picture = Picture(args.ref, args.fit)
    session = Session(args)
    session.open(picture, steps)
    return session


def method_of(args: Namespace, lam=None) -> Method:
    """The preset, or the user's own method, with the flags that were given; its code's sha256 in `args.own_code`."""
    args.own_code, args.method = {}, Method.name if args.method is None else args.method
    if is_own(args.method):
        method, args.own_code["--method"] = own_method(args.method)
    else:
        method = method_named(args.method)
    if getattr(args, "attend", None) is not None:
        own, args.own_code["--attend"] = own_method(args.attend, "--attend")
        method = replace(method, mix=own.mix)
    given = {field.name: getattr(args, field.name) for field in fields(Method)
             if "help" in field.metadata and field.name != "lam" and getattr(args, field.name) is not None}
    if callable(method.mix):
        idle = [f"--{name.replace('_', '-')}" for name in ("mix", "layers", "replace_above") if name in given]
        given.pop("mix", None)
        if idle:
            note(f"{', '.join(idle)}: no effect, your own attention decides that")
    method = replace(method, **given, **({} if lam is None else {"lam": lam})).check(1000)
    if args.n > 1 and method.deterministic:  # several pictures would be one picture
        note(f"with --init inverted every seed gives the same picture; using --diversity {DIVERSITY_OF_MANY} "
             "(--init shuffle and --init random differ more)")
        return replace(method, diversity=DIVERSITY_OF_MANY)
    return method


def seeds_of(args: Namespace) -> tuple[int, ...]:
    """The seeds, one per picture. Raises Problem for these and the other counts, before the work."""
    for name in ("n", "rows_at_once", "replay_at_once"):
        value = getattr(args, name)
        if not 1 <= value <= MOST:
            flag = name.replace("_", "-")
            raise Problem(f"--{flag} is {value}, expected 1 or more" + (f", at most {MOST}" if value > MOST else ""))
    if not 0 <= args.seed < 2**62:
        raise Problem(f"--seed is {args.seed}, expected 0 to 2^62")
    return tuple(range(args.seed, args.seed + args.n))
