"""What does not depend on the step is computed once: a probe counts the calls of each projection and encoder."""

from collections import Counter
from contextlib import contextmanager

import pytest

import isadca

STEPS = (2, 5)
RUNS = {"noise": dict(), "attention": dict(mix="attention"), "unguided": dict(guidance=1), "rival": dict(lam=1),
        "adapter alone": dict(lam=0), "two seeds": dict(seeds=(0, 1), init="shuffle")}


@contextmanager
def counted(model):
    """How often each module of the text's and the picture's side was called while the block ran."""
    calls, hooks = Counter(), []
    watched = {"text": model.text, "vision": model.vision, "image_proj": model.ip_adapter.image_proj}
    for site in model.unet.sites:
        if site.kind == "cross":
            layer = model.unet.get_submodule(site.name)
            watched |= {f"{site.name}.to_k": layer.to_k, f"{site.name}.to_v": layer.to_v}
    for name, module in watched.items():
        hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_projects_its_prompts_and_looks_at_its_picture_once(tiny, cat, changes):
    """Whatever the number of steps and pictures: the reference's prompt to invert it and to replay it, and each
    guidance half's. The picture is looked at only where the method's image branch reads it."""
    by_steps = []
    for steps in STEPS:
        with counted(tiny) as calls:
            ref = isadca.invert(tiny, cat, steps=steps)
            isadca.vary(tiny, ref, "a lemon", **changes)
        by_steps.append(calls)
    few, many = by_steps
    assert few == many
    halves = 1 if changes.get("guidance") == 1 else 2
    replayed = changes.get("lam") != 0
    projected = {name: n for name, n in many.items() if "attn2" in name}
    assert projected and set(projected.values()) == {1 + replayed + halves}
    assert many["vision"] == many["image_proj"] == (changes.get("lam") != 1)
