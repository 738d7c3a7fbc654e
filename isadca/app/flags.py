"""The flags of every command. Those of a method are the fields of Method, which hold their defaults and their words."""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from .. import __version__
from ..common.problem import Problem
from ..methods import PRESETS, Cosine, Lambda, Linear, Method
from .fetch import names as fetchable

KEEP = "where this is white the reference stays as it is"


class Parser(argparse.ArgumentParser):
    """Reports errors in one line. Flags may stand anywhere and are not abbreviated."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str):
        from ..common.habits import meant
        mine = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        for flag in re.findall(r"(?<=[ :])--?[a-zA-Z][\w-]*", message) if "unrecognized" in message else []:
            near = meant(flag, mine)
            message += f"; did you mean --{near}?" if near else ""
        raise Problem(f"{message}; see {self.prog} --help")


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole, for --help, and each command's own."""
    top = Parser("isadca", description="Image variations with Stable Diffusion 1.5: intra-image self-attention, "
                 "decoupled cross-attention and λ. Without --weights: the demo checkpoint.")
    top.add_argument("--version", action="version", version=f"isadca {__version__}")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    _vary(commands)
    _sweep(commands)
    _one_reference(commands)
    _evaluate(commands)
    _files(commands)
    return top, commands.choices


def parse_lam(text: str) -> Lambda:
    """"0.7", "linear:1:0.3" or "cosine:1:0" -> λ. Raises Problem."""
    kind, *ends = text.split(":")
    shapes: dict[str, Callable[..., Lambda]] = {"linear": Linear, "cosine": Cosine}
    shape = shapes.get(kind)
    try:
        numbers = [float(number) for number in (ends if shape else [text])]
        lam: Lambda = shape(*numbers) if shape else numbers[0]
    except (ValueError, TypeError):
        raise Problem(f"lam is {text!r}, expected a number such as 0.7, or linear:1:0.3, or cosine:1:0") from None
    if not all(0 <= number <= 1 for number in numbers):
        raise Problem(f"lam is {text}, expected 0 to 1; 1 is ISA alone, 0 is DCA alone")
    return lam


def parse_layers(text: str) -> tuple[int, ...]:
    """"10-15" or "0,1,6" -> the numbers."""
    found = re.fullmatch(r"(\d{1,3}(-\d{1,3})?)(,\d{1,3}(-\d{1,3})?)*", text, re.ASCII)
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")] if found else []
    if not found or any(end[0] > end[-1] for end in ends):
        raise argparse.ArgumentTypeError(f"{text!r}, expected such as 10-15 or 0,1,6")
    return tuple(n for end in ends for n in range(end[0], end[-1] + 1))


def parse_size(text: str) -> tuple[int, int]:
    """"512" or "512x768" -> (width, height)."""
    found = re.fullmatch(r"(\d{1,9})(?:[x,](\d{1,9}))?", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}, expected such as 512 or 512x768")
    return int(found[1]), int(found[2] or found[1])


def whole(least: int, most: int = 10_000):
    """Whole numbers from `least` to `most`, as argparse reads them."""
    def number(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,20}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {least} to {most}")
        return int(text)
    return number


def _vary(commands) -> None:
    p, groups = _command(commands, "vary", "a picture and a prompt become a variation",
                         'isadca vary examples/cat.png "a lemon" -o lemon.png --lam 0.7')
    p.usage = "isadca vary REF [REF ...] PROMPT -o OUT [flags]"
    add = groups.basic.add_argument
    add("words", nargs="*", metavar="REF PROMPT", help="pictures, folders of them, or what isadca invert wrote; "
        "then the prompt, or a .txt file with one prompt a line")
    _out(groups, "OUT", "a .png; a folder for several", required=False)  # an unknown flag is named before a missing -o
    _generation(groups, lam=True)
    add("--grid", type=Path, metavar="SHEET.png", help="with --n: also a contact sheet")
    add("--preview", type=Path, metavar="PNG", help="write the picture so far here, every five steps")
    add("--recipe", metavar="PNG", help="a PNG of isadca vary: make it again; other flags change it")
    add("--overwrite", action="store_true", help="in a folder: replace isadca's pictures of another recipe")
    add("--log", type=Path, metavar="FILE.jsonl", help="append a line of JSON for each finished picture")


def _sweep(commands) -> None:
    _, groups = _command(commands, "sweep", "a labelled grid: one column per λ, one row per prompt",
                         'isadca sweep examples/cat.png "a lemon" "a pig" --lam 0,0.5,1 -o grid.png')
    groups.basic.add_argument("ref", metavar="REF")
    groups.basic.add_argument("prompts", nargs="+", metavar="PROMPT")
    _out(groups, "GRID.png")
    groups.basic.add_argument("--lam", default="0,0.25,0.5,0.7,1", help="comma-separated (%(default)s)")
    _generation(groups)


def _one_reference(commands) -> None:
    for name, summary, out, example in [
            ("explore", "one run from inside, as a page to look at in a browser", "PAGE.html", '"a lemon" -o cat.html'),
            ("reconstruct", "invert and go back without control; reports the PSNR", "OUT.png", "-o back.png"),
            ("invert", "invert once, for many runs", "REF.safetensors", "-o cat.safetensors")]:
        _, groups = _command(commands, name, summary, f"isadca {name} examples/cat.png {example}")
        groups.basic.add_argument("ref", metavar="REF")
        if name == "explore":
            groups.basic.add_argument("prompt", metavar="PROMPT")
            groups.basic.add_argument("--lam", type=float, default=Method.lam,
                                      help="λ of the run that is taken apart (%(default)s)")
            groups.basic.add_argument("--keep", metavar="PNG", help=KEEP)
            groups.basic.add_argument("--method", metavar="NAME", help="one more method to show beside λ: "
                                      f"{', '.join(PRESETS)}, or your own FILE.py:NAME")
        _out(groups, out)
        _inversion(groups, steps="20" if name == "explore" else f"{Method.steps}")


def _evaluate(commands) -> None:
    _, groups = _command(commands, "evaluate", "the paper's Table 1: every system and every metric, over pairs",
                         "isadca evaluate weights/demo/pairs -o results")
    add = groups.basic.add_argument
    add("pairs", metavar="PAIRS", help="a folder with pairs.csv, pairs.json or DreamBooth's dataset")
    _out(groups, "RESULTS/")
    add("--systems", help="comma-separated (all whose weights are there): rival, ip-adapter, isadca, "
        "isadca-0.5, isadca-attention, a preset that isadca methods lists, or FILE.py:NAME: your own, or "
        "one of examples/counterparts; fields of a method go after a colon, such as isadca:lam=0.3:init=random")
    add("--metrics", type=lambda text: text.split(","), help="comma-separated (all whose weights are there): "
        "lpips-alex, lpips-vgg, ssim, ssim-luma, sifid, clip-i, clip-t, clipscore")
    add("--seeds", type=lambda text: tuple(whole(0, 2**62)(part.strip()) for part in text.split(",")), default=(0,),
        help="comma-separated (0)")
    add("--steps", type=int, help=f"DDIM steps (each system's own, {Method.steps}; quick has 10)")
    _weights(groups)


def _files(commands) -> None:
    _, groups = _command(commands, "inspect", "what a weights file or folder is and whether it would load; a picture's "
                         "recipe; a saved reference; a results folder", "isadca inspect weights/demo")
    groups.basic.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    groups.basic.add_argument("--json", action="store_true", help="one JSON object a path, for programs")
    _, groups = _command(commands, "check", "does this machine compute what it should? A demo picture is made again",
                         "isadca check --device cuda")
    _machine(groups)
    groups.basic.add_argument("--renew", action="store_true", help="store it anew, after the demo was trained again")
    _command(commands, "methods", "the presets of --method, field by field", "isadca methods")
    _, groups = _command(commands, "completion", "what bash or zsh needs to complete commands and flags",
                         "source <(isadca completion bash)")
    groups.basic.add_argument("shell", choices=("bash", "zsh"))
    p, groups = _command(commands, "fetch", "download the published weights, verify them, and say how to use them",
                         "isadca fetch sd15 ip-adapter --to weights")
    p.formatter_class = argparse.RawDescriptionHelpFormatter  # the names, unbroken
    listed = [f"  {name:22}{size / 1e9:5.2f} GB" for name, size in fetchable().items()]
    p.epilog = "\n".join([f"{p.epilog}\n", "NAME:", *listed])
    groups.basic.add_argument("names", nargs="+", metavar="NAME", help="all, or some of those below")
    groups.basic.add_argument("--to", type=Path, default="weights", metavar="FOLDER", help="(%(default)s)")
    _, groups = _command(commands, "convert", "a PyTorch pickle (.bin, .pth, .ckpt) to safetensors; for files you "
                         "trust", "isadca convert ip-adapter_sd15.bin -o ip-adapter_sd15.safetensors")
    groups.basic.add_argument("source", type=Path, metavar="FILE", help="also an IP-Adapter's training checkpoint")
    _out(groups, "FILE.safetensors")


def _command(commands, name: str, summary: str, example: str) -> tuple[Parser, SimpleNamespace]:
    p = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".",
                            epilog=f"example: {example}")
    p.set_defaults(command=name)
    groups = {title: p.add_argument_group(title) for title in ("basic", "method", "files", "machine")}
    return p, SimpleNamespace(**groups)


def _out(groups, metavar: str, help: str | None = None, required: bool = True) -> None:
    groups.basic.add_argument("-o", "--out", type=Path, required=required, metavar=metavar, help=help)


def _generation(groups, lam: bool = False) -> None:
    """What sampling needs. A default of None means the method's own."""
    basic, machine = groups.basic.add_argument, groups.machine.add_argument
    basic("--method", metavar="NAME", help=f"{', '.join(PRESETS)}, or your own FILE.py:NAME ({Method.name})")
    groups.method.description = "In parentheses: the preset 'isadca'; the command isadca methods lists the others."
    for field in fields(Method):
        if "help" in field.metadata and (lam or field.name != "lam"):
            default = "all" if field.default is None else field.default
            add = basic if field.name == "lam" else groups.method.add_argument
            add(f"--{field.name.replace('_', '-')}", choices=field.metadata["choices"],
                type=str if field.name == "lam" else parse_layers if field.default is None else type(field.default),
                help=field.metadata["help"] + (f" ({default:g})" if isinstance(default, float) else f" ({default})"))
    regions = groups.method.add_argument
    regions("--mask", metavar="PNG", help="the reference acts where this is white, the text alone where it is black")
    regions("--keep", metavar="PNG", help=KEEP)
    regions("--also", metavar="PICTURE", help="a second reference: its look joins the first one's, its layout does not")
    basic("--negative", default="", help='negative prompt ("")')
    basic("--seed", type=whole(0, 2**62), default=0, help="of the first picture; the next has seed + 1 (%(default)s)")
    basic("-n", "--n", type=whole(1), default=1, help="number of pictures (%(default)s)")
    machine("--rows-at-once", type=whole(1), default=64, help="rows of one UNet call at most (%(default)s)")
    machine("--replay-at-once", type=whole(1), default=5, help="reference steps per call (%(default)s)")
    _inversion(groups, steps=f"the method's, {Method.steps}")


def _inversion(groups, steps: str) -> None:
    """What loading and inverting need."""
    add = groups.basic.add_argument
    add("--steps", type=int, help=f"DDIM steps ({steps})")
    add("--ref-prompt", default="", help='what the reference shows, for its inversion ("")')
    add("--fixed-point", type=whole(0, 100), default=0, metavar="N",
        help="extra UNet calls for each step of the inversion, which make it more exact (%(default)s)")
    add("--fit", choices=("crop", "squash", "pad", "keep"), help="a picture of another shape: crop to the centre, "
        "distort, pad with white, or keep its shape at about as many pixels (crop: all training was square)")
    add("--size", type=parse_size, help="in pixels, such as 512 or 512x768 (what the model was trained on)")
    add("--width", type=whole(1), help="in pixels, alone or with --height, instead of --size")
    add("--height", type=whole(1), help="see --width")
    _weights(groups)
    groups.machine.add_argument("--compile", action="store_true", help="compile the UNet first, about a minute, for "
                                "faster steps on a GPU (off)")


def _weights(groups) -> None:
    add = groups.files.add_argument
    add("--weights", metavar="PATH", help="diffusers folder or LDM .safetensors (weights/demo)")
    add("--vae", metavar="PATH", help="another autoencoder")
    add("--ip-adapter", metavar="FILE", help="IP-Adapter .safetensors, or none (found beside the weights)")
    add("--image-encoder", metavar="PATH", help="its CLIP encoder (found beside the weights)")
    groups.basic.add_argument("-q", "--quiet", action="store_true", help="no start line, no progress bar")
    _machine(groups)


def _machine(groups) -> None:
    groups.machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    groups.machine.add_argument("--dtype", default="auto", help="auto, fp32, fp16, bf16 (%(default)s)")
