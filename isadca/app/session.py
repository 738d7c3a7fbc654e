"""What the commands share: a loaded model, references opened with it, the method that the flags ask for."""

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.files import save_png, sha256
from ..common.images import fit, load_image
from ..common.problem import Problem
from ..loading.known_encoders import guess
from ..loading.load import default_weights, find_tokenizer, load
from ..ddim import predict_x0
from ..loop import Noise, Run, decode, sample
from ..methods import Method, method_named
from ..reference import Reference, invert
from . import recipe as recipes
from .console import note
from .job import Job, is_demo, strange_words
from .own_code import is_own, own_method
from .saved_reference import load_reference

FITTED = {"crop": "its centre is used (or: --fit squash, --fit pad, --fit keep)", "squash": "it is distorted",
          "pad": "it gets white borders"}
DIVERSITY_OF_MANY = 0.3  # where every seed would give the same picture


class Picture:
    """A picture's file, read and hashed once, so that the recipe names what was used. A saved reference is not read."""

    def __init__(self, path: str, read: bool | None = None):
        self.path = Path(path)
        read = self.path.suffix != ".safetensors" if read is None else read
        self.sha256 = sha256(self.path) if self.path.is_file() else ""
        self.image: Any = load_image(self.path, note) if read else None  # an Image.Image
        if read and sha256(self.path) != self.sha256:
            raise Problem(f"{path}: changed while it was read; run it again")


class Session:
    """A loaded model, as the flags ask for it, and the reference that was opened last."""

    def __init__(self, args: Namespace, methods: Sequence[Method] = (), refs: int = 1, samplings: int = 0):
        self.args, self.job = args, Job(args, methods, refs, samplings)
        self.steps = methods[0].steps if methods else Method.steps
        self.beside = {name: Picture(path, read=True) for name in ("mask", "keep", "also")
                       if (path := getattr(args, name, None))}  # before the model, so that a bad one is named at once
        # who reads no image prompt needs neither the adapter nor its encoder
        wants_image = any(method.wants_image for method in methods)
        self.model = load(args.weights, args.ip_adapter if wants_image else "none", args.image_encoder, args.vae,
                          args.device, args.dtype, args.compile)
        if wants_image and self.model.ip_adapter is None:
            note("no IP-Adapter: the DCA branch sees the text alone")
        if self.model.vision and (told := guess(self.model.files["vision"], self.model.vision.config.width)):
            note(told)
        self.fit = "crop" if args.fit in (None, "keep") else args.fit  # what has to be another shape than its own
        self.also: Reference | None = None  # of --also, inverted once
        self.weights = weights = Path(args.weights or default_weights())
        self._hashes = recipes.hash_files(recipes.inputs_of(self.model.files, weights, find_tokenizer(weights)))

    @property
    def hashes(self) -> dict[str, str]:
        hashes = self._hashes.result() | getattr(self.args, "own_code", {})
        return hashes | {f"--{name}": picture.sha256 for name, picture in self.beside.items()}

    def open(self, picture: Picture) -> None:
        """Invert the picture, or take the saved inversion. Raises Problem where a recipe says it is another."""
        if picture is getattr(self, "picture", None):  # open already, for another prompt
            return
        args, self.picture = self.args, picture
        if source := getattr(args, "recipe_source", None):
            recipes.check_same(source, args.recipe, picture.path, picture.sha256, self.hashes)
            if other := recipes.made_elsewhere(source, self.recipe(picture) | {"batch": args.n}):
                note(f"{args.recipe} was made with {other}: a pixel may differ by one grey level")
        if picture.image is None:
            self.ref = self._saved()
            self.job.to_come["inverting"] -= 1
            self.job.begin(self.model, self.weights, self.ref.image.size, self.ref.steps)
        else:
            size = width, height = self.model.check_size(size_of(args, (self.model.size, self.model.size)))
            if args.fit == "keep":
                size = own_shape(picture.image.size, width * height, self.model.multiple)
            self.ref = self._invert(picture, self.steps if args.steps is None else args.steps, size)

    def _invert(self, picture: Picture, steps: int, size: tuple[int, int]) -> Reference:
        args, image, (width, height) = self.args, picture.image, self.model.check_size(size)
        if image.width * height != image.height * width and not (args.fit == "keep" and picture is self.picture):
            note(f"{picture.path} is {by(image.size)}; {FITTED[self.fit]}")
        self.model.schedule.steps(steps)  # raises Problem where they do not fit
        self.job.begin(self.model, self.weights, (width, height), steps)
        return invert(self.model, image, steps, self.prompt(args.ref_prompt), (width, height),
                      progress=self.job.progress, fit_by=self.fit, fixed_point=args.fixed_point)

    def made_with(self) -> str:
        """What an inversion depends on, as a saved reference holds it."""
        return json.dumps({part: digest for part, digest in self.hashes.items()
                           if not part.startswith(("vision", "ip_adapter", "--"))})

    def _saved(self) -> Reference:
        path, args = self.picture.path, self.args
        ref = load_reference(path, self.made_with(), self.model.device)
        size = self.model.check_size(ref.image.size)
        cells = tuple(side // self.model.vae.config.downscale for side in size)
        if ref.chain.shape[:1:-1] != cells or sha256(path) != self.picture.sha256:
            raise Problem(f"{path}: a damaged reference; invert the picture again")
        for flag, asked, has in [("--steps", args.steps, ref.steps), ("--size", by(size_of(args, size)), by(size)),
                                 ("--ref-prompt", args.ref_prompt or None, ref.prompt), ("--fit", args.fit, "its own"),
                                 ("--fixed-point", args.fixed_point or None, "its own")]:
            if asked not in (None, has):
                raise Problem(f"{flag} is {asked}, but {path} was inverted with {has or 'none'}; leave the flag out or "
                              "invert the picture again")
        return ref

    def sample(self, runs: list[Run]) -> list[torch.Tensor]:
        args, ref = self.args, self.ref
        if args.also and (self.also is None or (self.also.steps, self.also.image.size) != (ref.steps, ref.image.size)):
            self.also = self._invert(self.beside["also"], ref.steps, ref.image.size)
        on_step = None if getattr(args, "preview", None) is None else self._preview(args.preview)
        return sample(self.model, ref, runs, on_step=on_step, progress=self.job.progress, at_once=args.replay_at_once,
                      rows_at_once=args.rows_at_once, also=[self.also] if self.also else [],
                      mask=self.region("mask"), keep=self.region("keep"))

    def _preview(self, path: Path) -> Callable:
        """An on_step that writes, every five steps, the first picture as the noise at that step predicts it."""
        left = [step.t for step in self.model.schedule.steps(self.ref.steps)][::5]

        def on_step(run: Run, t: int, z: torch.Tensor, noise: Noise) -> None:
            if t in left:
                x0 = predict_x0(z[:1], noise.mixed[:1], self.model.schedule.alpha_bar(t))
                save_png(decode(self.model, x0)[0], path)
        return on_step

    def region(self, name: str) -> torch.Tensor | None:
        """The brightness of --mask or --keep, (h,w) from 0 to 1, fitted as the reference was."""
        if name not in self.beside:
            return None
        fitted = fit(self.beside[name].image, self.ref.image.size, self.fit).convert("L")
        return torch.from_numpy(np.array(fitted)).to(self.model.device) / 255

    def prompt(self, text: str) -> str:
        strange = strange_words(self.model, text) if is_demo(self.weights) and not self.args.quiet else []
        if strange:
            note(f"the demo does not know {', '.join(strange)}; what it knows: weights/demo/README.md")
        if cut := self.model.tokenizer.cut(text):
            short = cut if len(cut) < 80 else f"{cut[:48]} ... {cut[-24:]}"
            note(f"the prompt is longer than {self.model.tokenizer.max_tokens} tokens; not used: {short!r}")
        return text

    def recipe(self, picture: Picture, **changes) -> dict:
        args = vars(self.args) | {"ref": str(picture.path)} | changes
        return recipes.make_recipe(args, picture.sha256, self.hashes, str(self.model.device),
                                   str(self.model.dtype).removeprefix("torch."))


def size_of(args: Namespace, usual: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that the flags ask for."""
    width, height = args.size or usual
    return (width if args.width is None else args.width), (height if args.height is None else args.height)


def own_shape(size: tuple[int, int], pixels: int, multiple: int) -> tuple[int, int]:
    """(width, height) in the same proportions with about as many pixels, each side a multiple of `multiple`."""
    scale = (pixels / (size[0] * size[1])) ** 0.5 / multiple
    width, height = (multiple * max(1, round(side * scale)) for side in size)
    return width, height


def by(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def method_of(args: Namespace, lam=None) -> Method:
    """The preset, or the user's own method, with the flags that were given; its code's sha256 in `args.own_code`."""
    args.own_code, args.method = {}, Method.name if args.method is None else args.method
    if is_own(args.method):
        method, args.own_code["--method"] = own_method(args.method)
    else:
        method = method_named(args.method)
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
