"""The systems of the paper's Table 1 and Fig. 4 by name: each from a reference and a prompt to a picture.

Where the paper says nothing of a system it has its authors' settings; all steps and, but for SD image-variations, the
guidance are the paper's (T = 50, m = 7).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..common.images import fit
from ..common.problem import Problem
from ..loading.checkpoints import load_into
from ..loading.load import build, find_part
from ..loop import vary
from ..methods import ISADCA, PRESETS, Method
from ..networks.model import Model
from ..reference import Reference, invert
from .controlnet import restyle
from .image_variations import vary_image
from .load_others import load_controlnet, load_image_variations, load_prior
from .prior import embed_prompt

Draw = Callable[[Image.Image, str, int], Image.Image]  # reference, prompt, seed -> variation

LOOP = {name: replace(method, guidance=7.0) for name, method in PRESETS.items()} | {
    "isadca-0.5": replace(ISADCA, lam=0.5), "isadca-attention": replace(ISADCA, mix="attention"),
    "isadca-prior": ISADCA}
NEEDS = {"image-variations": "image-variations", "controlnet-shuffle": "controlnet-shuffle", "isadca-prior": "prior"}
SYSTEMS = ("rival", "ip-adapter", "image-variations", "controlnet-shuffle", "isadca", "isadca-0.5",
           "isadca-attention", "isadca-prior")  # what is compared unless told otherwise


def find_extra(weights: Path, name: str) -> Path | None:
    """What a system or a metric needs beyond the model: `name` in the weights folder or beside it."""
    folder = weights if weights.is_dir() else weights.parent
    return next((root / name for root in (folder, folder.parent) if (root / name).exists()), None)


def one_picture(name: str) -> bool:
    """Whether every seed gives the same picture. (The prior draws its embedding from the seed.)"""
    return name in LOOP and LOOP[name].deterministic and name != "isadca-prior"


def available_systems(model: Model, weights: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The systems whose weights are there; and of each other one, what it lacks."""
    lacking = {name: f"no {folder} in {weights} or beside it" for name, folder in NEEDS.items()
               if not find_extra(weights, folder)}
    if model.ip_adapter is None:
        lacking |= {name: "no IP-Adapter" for name in LOOP if LOOP[name].wants_image and name not in lacking}
    names = tuple(name for name in SYSTEMS if name not in lacking)
    return names, {name: why for name, why in lacking.items() if name in SYSTEMS}


def make_system(name: str, model: Model, weights: Path, steps: int = 50) -> Draw:
    """Load what the system needs and return it. Raises Problem for an unknown name and for weights that are missing."""
    if name not in LOOP and name not in NEEDS:
        raise Problem(f"system is {name!r}, expected one of {', '.join([*SYSTEMS, *(PRESETS.keys() - set(SYSTEMS))])}")
    extra = find_extra(weights, NEEDS[name]) if name in NEEDS else None
    if name in NEEDS and extra is None:
        raise Problem(f"{weights}: has no {NEEDS[name]} in it or beside it, which the system {name} needs; see "
                      "weights/README.md, or leave it out of --systems")
    if name == "image-variations":
        other = load_image_variations(extra, model.dtype, model.device)
        return lambda image, prompt, seed: vary_image(other, image, steps, seeds=(seed,))[0]
    if name == "controlnet-shuffle":
        controlnet = load_controlnet(extra, model.unet.config, model.dtype, model.device)
        return lambda image, prompt, seed: restyle(model, controlnet, image, prompt, steps, seed=seed)
    if name == "isadca-prior":
        return _with_prior(LOOP[name], model, weights, extra, steps)
    return lambda image, prompt, seed: _vary(LOOP[name], model, image, prompt, seed, steps)


def _vary(method: Method, model: Model, image: Image.Image, prompt: str, seed: int, steps: int,
          **options) -> Image.Image:
    """One variation from nothing: the reference is inverted where the method uses it."""
    if method.init == "random" and not method.wants_reference(1000, 1000):
        side = model.unet.config.sample_size
        blank = torch.zeros(steps + 1, 4, side, side, device=model.device)
        ref = Reference(fit(image, model.size), blank.to(torch.promote_types(model.dtype, torch.float32)))
    else:
        ref = invert(model, image, steps)
    return vary(model, ref, prompt, method, (seed,), **options)[0]


def _with_prior(method: Method, model: Model, weights: Path, folder: Path, steps: int) -> Draw:
    """The ablation of Fig. 4, row 4: DCA sees the image embedding that the prior expects of the prompt."""
    prior, encoder, tokenizer = load_prior(folder, model.dtype, model.device)
    if model.ip_adapter is None or model.ip_adapter.embed_dim != prior.config.embed_dim:
        path = next((found for name in ("ip-adapter_sd15_vit-G.safetensors", "models/ip-adapter_sd15_vit-G.safetensors")
                     if (found := find_extra(weights, name))), None)
        if path is None:
            raise Problem(f"{weights}: the prior's embeddings are {prior.config.embed_dim} wide and need an IP-Adapter "
                          "that reads them; put ip-adapter_sd15_vit-G.safetensors in it or beside it")
        part = find_part(path, "ip_adapter", model.dtype)
        model = replace(model, ip_adapter=load_into(build(part), part, model.dtype, model.device))

    def draw(image: Image.Image, prompt: str, seed: int) -> Image.Image:
        embeds = embed_prompt(prior, encoder, tokenizer, prompt, seed=seed)
        return _vary(method, model, image, prompt, seed, steps, image_embeds=embeds)
    return draw
