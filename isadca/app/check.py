"""isadca check: does this machine compute what it should? A stored picture of the demo is made again."""

from argparse import Namespace
from time import perf_counter

import numpy as np
from PIL import ImageChops

from ..common.files import save_png, sha256
from ..common.images import load_image
from ..common.problem import Problem
from ..loading.load import default_weights, load
from ..loop import Run, decode, sample
from ..reference import invert
from .recipe import hash_files, make_recipe, read_recipe

CLOSE, CLOSE_ELSEWHERE = 1, 16  # grey levels; on CPUs float32 gave 0 (float64 too), float16 1, bfloat16 6 and 9


def check(args: Namespace) -> None:
    """The demo's cat as a lemon, in ten steps, against the stored picture; CLOSE says how near."""
    start, folder = perf_counter(), default_weights()
    stored, cat = folder / "check.png", folder / "references" / "cat.png"
    model = load(device=args.device, dtype=args.dtype)
    hashes = hash_files(model.files).result()
    [picture] = decode(model, sample(model, invert(model, load_image(cat), steps=10), [Run("a lemon")])[0])
    where = str(model.device), str(model.dtype).removeprefix("torch.")
    if args.renew:
        save_png(picture, stored, make_recipe({"command": "check"}, sha256(cat), hashes, *where))
        return print(stored)
    if read_recipe(stored).get("weights_sha256") != hashes:
        raise Problem(f"{stored}: was made with other demo weights; install isadca anew, or after training: "
                      "isadca check --renew")
    apart = int(np.asarray(ImageChops.difference(picture, load_image(stored))).max())
    close = CLOSE if where == ("cpu", "float32") else CLOSE_ELSEWHERE
    found = f"{apart} grey level{'s' * (apart != 1)} from {stored} at most, {close} allowed on {' in '.join(where)}"
    if apart > close:
        raise Problem(f"another picture: {found}; try --device cpu --dtype fp32, or another version of torch")
    print(f"OK: {found}; {perf_counter() - start:.0f} s")
