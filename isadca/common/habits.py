"""What people who come from other tools type, and what they mean here. Imported when a name is unknown."""

import difflib
from collections.abc import Iterable

HABITS = {"cfg": "guidance", "cfg-scale": "guidance", "guidance-scale": "guidance", "num-inference-steps": "steps",
          "s": "steps", "negative-prompt": "negative", "num-images": "n", "num-images-per-prompt": "n",
          "n-samples": "n", "batch-size": "n", "batch-count": "n", "n": "seeds", "seed": "seeds", "lambda": "lam",
          "model": "weights", "strength": "diversity", "attend": "method", "ip-adapter-scale": "ip-scale",
          "force": "overwrite", "output": "out", "output-dir": "out", "w": "width", "h": "height",
          "fp16": "dtype", "half": "dtype"}
NOT_HERE = {"prompt", "image", "lora", "denoise", "sampler", "scheduler"}  # what is near them in spelling misleads


def meant(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is meant by `name`, both without leading hyphens, or None."""
    name, known = name.strip("-").lower().replace("_", "-"), {each.replace("_", "-"): each for each in known}
    if (habit := HABITS.get(name)) in known:
        return known[habit]
    near = [] if name in NOT_HERE else difflib.get_close_matches(name, known, 1, 0.7)
    return known[near[0]] if near else None
