"""Do pictures, tables and saved references stay what they were? Run it before and after a change of the code.

    PYTHONPATH=. python tests/oracles/before_after.py > before.txt
    PYTHONPATH=. python tests/oracles/before_after.py --against before.txt

Each line is a name and the sha256 of pixels, tensors or figures; recipes are left out, as they may gain fields. The
command line is run in this process, and only what has been public all along is called, so that the script can be
copied beside an older version. About a minute on one core.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import isadca

DEMO = Path(isadca.__file__).parent.parent / "weights/demo"
STEPS = 5
FLAGS = ["--steps", str(STEPS), "--device", "cpu", "--dtype", "fp32", "-q"]
METRICS = ("lpips-alex", "lpips-vgg", "ssim", "ssim-luma", "sifid", "clip-i", "clip-t", "clipscore")


def sha(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def of_tensor(x: torch.Tensor) -> str:
    x = x.detach().cpu().contiguous()
    return sha(str(x.dtype), str(tuple(x.shape)), x.view(torch.uint8).numpy().tobytes())


def of_file(path: Path) -> str:
    if path.suffix == ".safetensors":
        return sha(*(name + of_tensor(x) for name, x in sorted(load_file(path).items())))
    with Image.open(path) as image:
        return sha(image.mode, str(image.size), image.tobytes())


def isadca_command(*argv: str) -> None:
    """`isadca ARGV`, without a new process."""
    before, sys.argv = sys.argv, ["isadca", *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            runpy.run_module("isadca", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"isadca {' '.join(argv)}: {errors.getvalue()}") from None
    finally:
        sys.argv = before


def by_command_line():
    """(name, the command's arguments); what it writes is o.png unless the arguments say otherwise."""
    vary = ["vary", "cat.png", "a lemon"]
    for name in isadca.PRESETS:
        yield f"vary {name}", [*vary, "--method", name]
    for mix in ("noise", "attention"):
        for lam in ("0", "0.3", "1", "linear:1:0.3", "cosine:1:0"):
            yield f"vary {mix} {lam}", [*vary, "--mix", mix, "--lam", lam]
        yield f"vary {mix} windows", [*vary, "--mix", mix, "--k", "200", "--t-start", "900", "--layers", "2-4",
                                      "--replace-above", "500", "--adain-above", "500"]
        yield f"vary {mix} guidance", [*vary, "--mix", mix, "--guidance", "1", "--ip-scale", "0.5"]
        yield f"vary {mix} two", [*vary, "--mix", mix, "--n", "2", "--diversity", "0.4", "--grid", "sheet.png"]
    for init in ("shuffle", "random"):
        yield f"vary {init}", [*vary, "--init", init, "--seed", "3", "--negative", "a cat"]
    yield "vary without an adapter", [*vary, "--ip-adapter", "none", "--lam", "0.5"]
    yield "vary in bf16", [*vary, "--dtype", "bf16"]
    yield "vary one by one", [*vary, "--rows-at-once", "1", "--replay-at-once", "1"]
    yield "vary larger", [*vary, "--size", "96", "--steps", "2"]
    yield "sweep", ["sweep", "cat.png", "a pig", "a tree", "--lam", "0,0.5,1"]
    yield "sweep attention", ["sweep", "cat.png", "a pig", "--lam", "0.2", "--mix", "attention"]
    yield "reconstruct", ["reconstruct", "cat.png"]
    yield "invert", ["invert", "cat.png", "--ref-prompt", "a cat", "-o", "cat.safetensors"]
    yield "vary what was inverted", ["vary", "cat.safetensors", "a lemon", "--ref-prompt", "a cat"]
    yield "vary what was inverted, two", ["vary", "cat.safetensors", "a pig", "--n", "2", "--init", "shuffle"]


def commands(weights: Path):
    flags = [*FLAGS, "--weights", str(weights)]
    for name, arguments in by_command_line():
        arguments = [argument.replace("WEIGHTS", str(weights)) for argument in arguments]
        out = [] if "-o" in arguments else ["-o", "o.png"]
        own = flags[2:] if arguments[:2] == ["vary", "cat.safetensors"] else flags
        before = set(Path().iterdir())
        isadca_command(arguments[0], *own, *arguments[1:], *out)  # of a flag given twice, the last counts
        for path in sorted(set(Path().iterdir()) - before):
            yield f"command: {name}: {path.name}", of_file(path)
            if path.suffix == ".png":
                path.rename("last.png")
                before.add(Path("last.png"))
        if name == "vary isadca":
            isadca_command("vary", "--recipe", "last.png", "-o", "again.png", "-q")
            yield "command: its recipe again", of_file(Path("again.png"))


def table(weights: Path):
    """Two pairs, every system and metric; times are not compared."""
    Path("pairs").mkdir()
    Path("pairs/pairs.csv").write_text("reference,prompt\n../cat.png,a lemon\n../pig.png,a tree\n")
    isadca_command("evaluate", "pairs", "-o", "results", "--steps", "2", *FLAGS[2:], "--weights", str(weights))
    with open("results/results.csv", newline="") as file:
        for row in csv.DictReader(file):
            for metric in METRICS:
                yield f"table: {row['prompt']}: {row['system']}: {metric}", sha(row[metric])
    for path in sorted(Path("results").rglob("*.png")):
        yield f"table: {path}", of_file(path)


def by_python(weights: Path):
    for dtype in ("fp32", "fp64"):
        model = isadca.load(weights, device="cpu", dtype=dtype)
        ref = isadca.invert(model, isadca.load_image("cat.png"), STEPS, "a cat")
        yield f"python: chain {dtype}", of_tensor(ref.chain)
        for step, replayed in enumerate(isadca.replay(model, ref)):
            yield f"python: replay {dtype} {step}", sha(of_tensor(replayed.eps), *(
                name + of_tensor(k) + of_tensor(v) for name, (k, v) in sorted(replayed.kv.items())))
        runs = [isadca.Run("a lemon", isadca.Method(lam=lam, mix=mix, init="shuffle"), (0, 5), "a cat")
                for lam in (0, 0.5, 1, isadca.Linear(1, 0.2)) for mix in ("noise", "attention")]
        for run, z in zip(runs, isadca.sample(model, ref, runs)):
            yield f"python: {dtype} {run.method.mix} {run.method.lam}", of_tensor(z)
        yield f"python: reconstruct {dtype}", sha(isadca.reconstruct(model, ref).tobytes())
        for i, image in enumerate(isadca.vary(model, ref, "a pig", isadca.Method(diversity=0.3), seeds=(1, 2))):
            yield f"python: vary {dtype} {i}", sha(image.tobytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="FILE", help="lines of an earlier run")
    parser.add_argument("--weights", type=Path, default=DEMO, help="a copy of weights/demo, if that was trained anew")
    args = parser.parse_args()
    before = dict(line.rsplit(" ", 1) for line in args.against.read_text().splitlines()) if args.against else None
    torch.set_num_threads(1)
    home, weights, found = os.getcwd(), args.weights.resolve(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("cat.png", "pig.png"):
            Path(name).write_bytes((weights / "references" / name).read_bytes())
        for part in (commands, table, by_python):
            for name, digest in part(weights):
                found[name] = digest
                if before is None:
                    print(name, digest, flush=True)
        os.chdir(home)
    if before is None:
        return 0
    for name in [name for name in before if before[name] != found.get(name)]:
        print("differs:" if name in found else "is gone:", name)
    same = sum(before[name] == found.get(name) for name in before)
    print(f"{same} of {len(before)} are the same; {len(found.keys() - before.keys())} are new")
    return same < len(before)


if __name__ == "__main__":
    raise SystemExit(main())
