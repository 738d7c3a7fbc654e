"""Numerical error: what float32, bfloat16 and float16 make of each network and each step, beside float64 on the CPU.

    python tests/oracles/precision.py            the table, with the demo's weights (about a minute)
    python tests/oracles/precision.py --write    into tests/README.md

Both errors are relative to the float64 result's root mean square: that of the largest difference, and that of the
differences' own root mean square. The tolerances are those of tolerances.py, which tests use.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from attention_cases import SIZES, VARIANTS, drawn
from conftest import DEMO, ROOT
from equations import with_table
from tolerances import ATTENTION, BF16, CHAIN, F16, F32, F64, NETWORK, TEXT_HALF, UNET_HALF
from torch import Tensor

import isadca
from isadca.attention import attend, attend_reference
from isadca.common.images import clip_pixels, to_tensor
from isadca.loop import Run, sample

NAMES = {F64: "fp64", F32: "fp32", BF16: "bf16", F16: "fp16"}
LOW = (F32, BF16, F16)
PAGE = ROOT / "tests" / "README.md"
RUN = Run("a lemon")                       # the paper's method, λ 0.7
Result = dict[str, Tensor]                 # part -> what it gives


class Part(NamedTuple):
    tolerance: dict[torch.dtype, float]
    why: str


TWIN = "the library's network beside ours: two roundings"
KERNEL = "twice the largest error over all sizes and variants"
PARTS = {
    "UNet, one pass": Part(NETWORK | UNET_HALF, f"{TWIN}; bf16 by the norm of the difference"),
    "VAE encoder": Part(NETWORK, f"{TWIN}; the package never runs it in half precision"),
    "VAE decoder": Part(NETWORK, "the same"),
    "CLIP text": Part(NETWORK | TEXT_HALF, f"{TWIN}; half precision: random weights, for inf and NaN"),
    "CLIP image": Part(NETWORK, TWIN),
    "IP-Adapter, tokens": Part(NETWORK, TWIN),
    "IP-Adapter, keys and values": Part(NETWORK, TWIN),
    "attention, written out": Part(ATTENTION, KERNEL),
    "attention, fused": Part(ATTENTION, "the same"),
    "ISA, append": Part(ATTENTION, "the same"),
    "ISA, replace": Part(ATTENTION, "the same"),
    "DCA": Part(ATTENTION, "the same"),
    "ISA mixed in attention": Part(ATTENTION, "the same"),
    "inversion step": Part({}, "tested as part of the whole"),
    "sampling step": Part({}, "tested as part of the whole"),
    "inversion, 10 steps": Part(CHAIN, "each latent of 50 steps against diffusers'; the steps' errors add up"),
    "whole run, 10 steps": Part({}, "its pictures are compared; guidance multiplies errors by 7"),
}
KINDS = {"ISA, append": "isa append", "ISA, replace": "isa replace", "DCA": "dca",  # names of VARIANTS
         "ISA mixed in attention": "blend isa"}


# ---- what is measured ----------------------------------------------------------------------------------------

@lru_cache
def model_in(dtype: torch.dtype):
    """The demo as the package runs it in this precision: beside half precision the VAE stays in float32."""
    return isadca.load(DEMO, device="cpu", dtype=NAMES[dtype])


@lru_cache
def cat():
    return isadca.load_image(DEMO / "references" / "cat.png")


@lru_cache
@torch.no_grad()
def unet(dtype: torch.dtype) -> Result:
    model, generator = model_in(dtype), torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 16, 16, generator=generator, dtype=F64).to(dtype)
    context = model_in(F64).context(["", "a cat"]).to(dtype)
    return {"UNet, one pass": model.unet(z, torch.tensor([961, 301]), context)}


@lru_cache
@torch.no_grad()
def autoencoder(dtype: torch.dtype) -> Result:
    pixels = to_tensor(cat())
    z = model_in(F64).vae.encode(pixels.to(F64))
    vae = isadca.load(DEMO, device="cpu", dtype=NAMES[dtype]).vae.to(dtype)
    return {"VAE encoder": vae.encode(pixels.to(dtype)), "VAE decoder": vae.decode(z.to(dtype))}


@lru_cache
@torch.no_grad()
def text(dtype: torch.dtype) -> Result:
    model = model_in(dtype)
    return {"CLIP text": model.text(model.tokenizer(["", "a cat on a red backdrop"]))}


@lru_cache
@torch.no_grad()
def image(dtype: torch.dtype) -> Result:
    model, exact = model_in(dtype), model_in(F64)
    pixels = clip_pixels(cat(), model.vision.config.image_size)
    seen, _ = exact.vision(pixels.to(F64))
    tokens = exact.ip_adapter.tokens(seen, torch.zeros_like(seen))
    adapter, unet = model.ip_adapter, model.unet
    kv = adapter.keys_values(tokens.to(dtype), unet.sites, unet.config.n_heads)
    return {"CLIP image": model.vision(pixels.to(dtype))[0],
            "IP-Adapter, tokens": adapter.tokens(seen.to(dtype), torch.zeros_like(seen).to(dtype)),
            "IP-Adapter, keys and values": torch.cat([x.flatten() for pair in kv.values() for x in pair])}


@lru_cache
def attention(dtype: torch.dtype) -> Result:
    torch.manual_seed(0)
    q, k, v, *extra = [x.to(dtype) for x in drawn(SIZES[2])]
    found = {"attention, written out": attend_reference(q, k, v), "attention, fused": attend(q, k, v)}
    for part, name in KINDS.items():
        variant = VARIANTS[name]
        found[part] = variant.build(extra, attend)(q, k, v, variant.site)
    return found


@lru_cache
@torch.no_grad()
def exact_run():
    """In float64: the reference, and z before each step of a run and after the last."""
    ref, before = isadca.invert(model_in(F64), cat(), 10), []
    z_0 = sample(model_in(F64), ref, [RUN], on_step=lambda run, t, z, noise: before.append(z) or None)[0]
    return ref, [*before, z_0]


@lru_cache
@torch.no_grad()
def loop(dtype: torch.dtype) -> Result:
    """Steps start from the float64 latents: the error that one step adds. Whole runs start from the picture."""
    model, (ref, exact) = model_in(dtype), exact_run()
    latents, steps, after = model.latent_dtype, model.schedule.steps(10), []
    context = model.unet.keys_values(model.context([""]))
    up = [model.schedule.inverse_step(z, model.noise(z, stride.t, context), stride)
          for z, stride in zip(ref.chain.to(latents).split(1), steps[::-1])]

    def restart(run, t, z, noise):
        after.append(z)
        return exact[len(after) - 1].to(latents)
    last = sample(model, replace(ref, chain=ref.chain.to(latents)), [RUN], on_step=restart)[0]
    own = isadca.invert(model, cat(), 10)
    return {"inversion step": torch.cat(up), "sampling step": torch.cat([*after[1:], last]),
            "inversion, 10 steps": own.chain, "whole run, 10 steps": sample(model, own, [RUN])[0]}


# ---- the table -----------------------------------------------------------------------------------------------

MEASURES = [unet, autoencoder, text, image, attention, loop]


def errors(measure: Callable[[torch.dtype], Result], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Part -> (largest, root mean square) error beside float64, both relative to its result's root mean square."""
    found, rounded = {}, measure(dtype)
    for part, exact in measure(F64).items():
        away, size = rounded[part].double() - exact, exact.square().mean().sqrt()
        found[part] = float(away.abs().max() / size), float(away.square().mean().sqrt() / size)
    return found


def tolerance_cell(part: Part) -> str:
    return ", ".join(f"{NAMES[dtype]} {limit:.0e}" for dtype, limit in part.tolerance.items()) or "none of its own"


HEADER = ["| part | float32 | bfloat16 | float16 | tolerance of the tests | why |", "|---|---|---|---|---|---|"]


def table() -> Iterator[str]:
    """Line by line, as they are measured."""
    yield from HEADER
    for measure in MEASURES:
        by_dtype = [errors(measure, dtype) for dtype in LOW]
        for part in by_dtype[0]:
            cells = [f"{most:.0e}, {rms:.0e}" for most, rms in (found[part] for found in by_dtype)]
            yield f"| {part} | {' | '.join(cells)} | {tolerance_cell(PARTS[part])} | {PARTS[part].why} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = []
    for line in table():
        made.append(line)
        print(line, flush=True)
    if "--write" in sys.argv:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
