"""The command line: what `isadca --help` lists, and how each command is called.

Paths of what was written go to standard output, everything else to standard error. Exit codes: 0, 2 for a problem
that the user can mend (one line says which), 130 when interrupted. Heavy imports wait until a command runs.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from ..common.own_code import is_own, own_failure
from ..common.problem import Problem
from ..methods import INITS, PRESETS, Cosine, Lambda, Linear
from .fetch import names as fetchable


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Problem(f"{message}; see {self.prog} --help")


def parser(recipe: dict | None = None) -> Parser:
    """All commands; `recipe` are defaults for `vary`."""
    top = Parser("isadca", description="Image variations with Stable Diffusion 1.5: intra-image self-attention, "
                 "decoupled cross-attention and λ. Without --weights: the demo checkpoint.")
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    _vary(commands, recipe or {})

    p = _command(commands, "sweep", "a labelled grid: one column per λ, one row per prompt",
                 'isadca sweep examples/cat.png "a lemon" "a pig" --lam 0,0.5,1 -o grid.png')
    p.add_argument("ref", metavar="REF")
    p.add_argument("prompts", nargs="+", metavar="PROMPT")
    _out(p, "GRID.png")
    p.add_argument("--lam", default="0,0.25,0.5,0.7,1", help="comma-separated (%(default)s)")
    _generation(p)

    _explore(commands)

    p = _command(commands, "reconstruct", "invert and go back without control; reports the PSNR",
                 "isadca reconstruct examples/cat.png -o back.png")
    p.add_argument("ref", metavar="REF")
    _out(p, "OUT.png")
    _inversion(p)

    p = _command(commands, "invert", "invert once, for many runs",
                 "isadca invert examples/cat.png -o cat.safetensors")
    p.add_argument("ref", metavar="PICTURE")
    _out(p, "REF.safetensors")
    _inversion(p)

    _evaluate(commands)
    _files(commands)
    return top


def _vary(commands, recipe: dict) -> None:
    p = _command(commands, "vary", "a picture and a prompt become a variation",
                 'isadca vary examples/cat.png "a lemon" -o lemon.png --lam 0.7')
    p.add_argument("ref", nargs="?", metavar="REF", help="reference picture, or what `isadca invert` wrote")
    p.add_argument("prompt", nargs="?", metavar="PROMPT")
    _out(p, "OUT.png")
    p.add_argument("--lam", help="λ: 1 is ISA alone, 0 is DCA alone; 0.7, linear:1:0.3 or cosine:1:0 (0.7)")
    _generation(p)
    p.add_argument("--prior", metavar="FOLDER", help="Kandinsky 2.2's prior: the image prompt is what it expects of "
                   "the text (with --ip-adapter ip-adapter_sd15_vit-G.safetensors)")
    p.add_argument("--attend", metavar="FILE.py:NAME", help="your own attention: a function Controls -> Attend")
    p.add_argument("--recipe", metavar="PNG", help="make a picture of `isadca vary` again; other flags change it")
    p.add_argument("--grid", metavar="SHEET.png", help="with --n: also a contact sheet")
    p.set_defaults(**recipe)


def _evaluate(commands) -> None:
    p = _command(commands, "evaluate", "the paper's Table 1: every system and every metric, over pairs",
                 "isadca evaluate weights/demo/pairs -o results")
    p.add_argument("pairs", metavar="PAIRS", help="a folder with pairs.csv or pairs.json (reference, prompt), or "
                   "DreamBooth's dataset folder")
    _out(p, "RESULTS/")
    p.add_argument("--systems", help="comma-separated (all whose weights are there): rival, ip-adapter, "
                   "image-variations, controlnet-shuffle, isadca, isadca-0.5, isadca-attention, isadca-prior, the "
                   "other names of isadca methods, your own FILE.py:NAME; flags of vary go after a colon, such as "
                   "isadca:lam=0.3 or rival:guidance=5;init=inverted")
    p.add_argument("--metrics", help="comma-separated (all whose weights are there): lpips-alex, lpips-vgg, ssim, "
                   "ssim-luma, sifid, clip-i, clip-t, clipscore")
    p.add_argument("--seeds", default="0", help="comma-separated (%(default)s)")
    p.add_argument("--steps", type=int, default=50, help="DDIM steps (%(default)s)")
    _weights(p)


def _files(commands) -> None:
    p = _command(commands, "inspect", "what a weights file or folder is, and whether it would load",
                 "isadca inspect weights/demo")
    p.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    p = _command(commands, "check", "does this machine compute what it should? A demo picture is made again",
                 "isadca check --device cuda")
    _machine(p)
    p.add_argument("--renew", action="store_true", help="store the picture anew, after the demo was trained again")
    _command(commands, "methods", "the presets of --method, field by field", "isadca methods")
    p = _command(commands, "fetch", "download the published weights, verify them, and say how to use them",
                 "isadca fetch sd15 ip-adapter --to weights")
    p.formatter_class = argparse.RawDescriptionHelpFormatter  # the names, unbroken
    p.epilog += "\n\nNAME:\n" + "\n".join(f"  {name:22}{size / 1e9:5.2f} GB" for name, size in fetchable().items())
    p.add_argument("names", nargs="+", metavar="NAME", help="all, or some of those below")
    p.add_argument("--to", type=Path, default="weights", metavar="FOLDER", help="(%(default)s)")
    p = _command(commands, "convert", "a PyTorch pickle (.bin, .pth, .ckpt) to safetensors; for files you trust",
                 "isadca convert ip-adapter_sd15.bin -o ip-adapter_sd15.safetensors")
    p.add_argument("source", type=Path, metavar="FILE", help="also an IP-Adapter's training checkpoint")
    _out(p, "FILE.safetensors")


def _explore(commands) -> None:
    p = _command(commands, "explore", "one run from inside, as a page to look at in a browser",
                 'isadca explore examples/rocket.png "a lemon" -o lemon.html')
    p.add_argument("ref", metavar="REF")
    p.add_argument("prompt", metavar="PROMPT")
    _out(p, "PAGE.html")
    p.add_argument("--lam", type=float, default=0.7, help="λ of the run that is taken apart (%(default)s)")
    _inversion(p, steps=20)


def _command(commands, name: str, summary: str, example: str) -> Parser:
    return commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".",
                               epilog=f"example: {example}")


def _out(p: Parser, metavar: str) -> None:
    p.add_argument("-o", "--out", type=Path, required=True, metavar=metavar)


def _inversion(p: Parser, steps: int = 50) -> None:
    """What loading and inverting need."""
    p.add_argument("--steps", type=int, help=f"DDIM steps ({steps})")
    p.add_argument("--ref-prompt", default="", help='what the reference shows, for its inversion ("")')
    p.add_argument("--fit", choices=("crop", "squash", "pad"),
                   help="what is not square: its centre, distorted, or with white borders (crop)")
    p.add_argument("--size", type=int, help="side in pixels (what the model was trained on)")
    _weights(p)


def _weights(p: Parser) -> None:
    p.add_argument("--weights", metavar="PATH", help="diffusers folder or LDM .safetensors (weights/demo)")
    p.add_argument("--vae", metavar="PATH", help="another autoencoder")
    p.add_argument("--ip-adapter", metavar="FILE", help="IP-Adapter .safetensors, or none (found beside the weights)")
    p.add_argument("--image-encoder", metavar="PATH", help="its CLIP encoder (found beside the weights)")
    _machine(p)
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bars")


def _machine(p: Parser) -> None:
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    p.add_argument("--dtype", default="auto", help="auto, fp32, fp16, bf16 (%(default)s)")


def _generation(p: Parser) -> None:
    """What sampling needs. A default of None means: as the method has it."""
    p.add_argument("--method", metavar="NAME", help=f"{', '.join(PRESETS)}, or your own FILE.py:NAME (isadca)")
    p.add_argument("--mix", choices=("noise", "attention"), help="where λ mixes (noise)")
    p.add_argument("--guidance", type=float, help="m of classifier-free guidance (7)")
    p.add_argument("--k", type=int, help="control is on for K < t <= T_START (0)")
    p.add_argument("--t-start", type=int, help="(1000)")
    p.add_argument("--layers", type=_layers, help="ISA in these transformer blocks only, such as 10-15 (all)")
    p.add_argument("--replace-above", type=int, metavar="T", help="for t above, ISA sees the reference alone (1000)")
    p.add_argument("--adain-above", type=int, metavar="T",
                   help="for t above, align ISA's noise to the reference's (1000)")
    p.add_argument("--ip-scale", type=float, help="weight of the image prompt (1)")
    p.add_argument("--init", choices=INITS, help="z_T: the reference's, its cells shuffled, or noise (inverted)")
    p.add_argument("--diversity", type=float, help="share of fresh noise in z_T, 0 to 1 (0)")
    p.add_argument("--negative", default="", help='negative prompt ("")')
    p.add_argument("--seed", type=int, default=0, help="of the first picture; the next has seed + 1 (%(default)s)")
    p.add_argument("--n", type=int, default=1, help="pictures (%(default)s)")
    p.add_argument("--rows-at-once", type=int, default=64, help="rows of one UNet call at most (%(default)s)")
    p.add_argument("--replay-at-once", type=int, default=5, metavar="M", help="reference steps per call (%(default)s)")
    _inversion(p)


def _layers(text: str) -> tuple[int, ...]:
    """"10-15" or "0,1,6" -> the numbers."""
    try:
        ends = [part.split("-") for part in text.split(",")]
        return tuple(n for e in ends for n in range(int(e[0]), int(e[-1]) + 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected such as 10-15 or 0,1,6") from None


def parse_lam(text: str) -> Lambda:
    """"0.7", "linear:1:0.3" or "cosine:1:0" -> λ. Raises Problem."""
    shapes = {"linear": Linear, "cosine": Cosine}
    try:
        kind, *numbers = text.split(":")
        if kind in shapes:
            first, last = map(float, numbers)
            value = shapes[kind](first, last)
        else:
            first = last = value = float(text)
    except ValueError:
        raise Problem(f"lam is {text!r}, expected a number such as 0.7, or linear:1:0.3, or cosine:1:0") from None
    if not (0 <= first <= 1 and 0 <= last <= 1):
        raise Problem(f"lam is {text}, expected 0 to 1; 1 is ISA alone, 0 is DCA alone")
    return value


def main(argv: list[str] | None = None) -> int:
    try:
        args = parser().parse_args(argv)
        args.recipe_source = None
        if getattr(args, "recipe", None):
            args = _again(args, argv)
        if args.command in ("vary", "sweep", "explore", "reconstruct", "invert"):
            from . import commands as home  # torch, from here on
        else:
            from . import tools as home
        getattr(home, args.command)(args)
        sys.stdout.flush()
        return 0
    except Problem as problem:
        return _fail(str(problem))
    except KeyboardInterrupt:
        print("isadca: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    """An error of the user's own code, of the system, or a lack of memory; raised again where it is isadca's own."""
    if isinstance(error, RuntimeError) and re.search("(out of|enough|allocate) memory", str(error)):
        error = MemoryError()
    if isinstance(error, MemoryError):
        return _fail("out of memory; try --rows-at-once 4, --replay-at-once 1, --dtype fp16 or a smaller --size")
    if own := own_failure(error):
        print(own[0], file=sys.stderr, end="")
        return _fail(own[1])
    if isinstance(error, OSError):  # standard output is full or closed, or a file went away
        sys.stdout = open(os.devnull, "w")  # or Python complains once more at its end
        return 0 if isinstance(error, BrokenPipeError) else _fail(
            f"{error.filename or 'standard output'}: {error.strerror or error}; mend that and run it again")
    raise error


def _again(given: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """The recipe's arguments, read as if they had been typed before those that were given."""
    from .recipe import read_recipe, recipe_flags
    source = Path(given.recipe)
    recipe = read_recipe(source)
    words, flags = recipe_flags(recipe, "vary", source)
    try:
        args = parser(words).parse_args(["vary", *flags, *(sys.argv[1:] if argv is None else argv)[1:]])
    except Problem as problem:
        raise Problem(f"{source}: its recipe is damaged or of another version: {problem}") from None
    for flag, own, typed in [("--method", is_own(args.method or "") and args.method, given.method),
                             ("--attend", args.attend, given.attend)]:
        if own and not typed:
            raise Problem(f"{source}: was made with {flag} {own}; give the flag again to run that code")
    args.recipe_source = recipe if given.ref is None and given.weights is None else None  # what is to be verified
    return args


def _fail(message: str) -> int:
    print("isadca: " + "".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)  # no terminal codes
    return 2


def _version() -> str:
    from .. import __version__
    return f"isadca {__version__}"
