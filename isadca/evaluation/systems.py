"""The systems of the paper's Table 1 and Fig. 4, one row each: from a reference and a prompt to a picture.

A new system is a new row of SYSTEMS. Where the paper says nothing of a system it has its authors' settings; all steps
and, but for SD image-variations, the guidance are the paper's (T = 50, m = 7).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..common.problem import Problem
from ..loading.checkpoints import load_into
from ..loading.load import build, find, find_part, inside
from ..loop import vary
from ..methods import ISADCA, PRESETS, Method
from ..networks.model import Model
from ..reference import invert
from .controlnet import restyle
from .image_variations import vary_image, without_inversion
from .load_others import load_controlnet, load_image_variations, load_prior
from .prior import embed_prompt

Draw = Callable[[Image.Image, str, int], Image.Image]  # reference, prompt, seed -> variation
Prepare = Callable[[Path, Model, Path, int], Draw]     # the folder it needs, model, weights, steps -> what draws


@dataclass(frozen=True)
class System:
    name: str
    label: str                        # in tables and sheets
    method: Method | Prepare          # of the loop; or what loads a system that is not the loop
    needs: str = ""                   # a folder of its own weights, in the model's or beside it
    paper: tuple[float, ...] = ()     # its row in the paper's Table 1: LPIPS, SSIM, SIFID, CLIP similarity
    code: str = ""                    # sha256 of the user's own code

    @property
    def deterministic(self) -> bool:
        """Whether every seed gives the same picture."""
        return isinstance(self.method, Method) and self.method.deterministic


def image_variations(folder: Path, model: Model, weights: Path, steps: int) -> Draw:
    other = load_image_variations(folder, model.dtype, model.device)
    return lambda image, prompt, seed: vary_image(other, image, steps, seeds=(seed,))[0]


def controlnet_shuffle(folder: Path, model: Model, weights: Path, steps: int) -> Draw:
    controlnet = load_controlnet(folder, model.unet.config, model.dtype, model.device)
    return lambda image, prompt, seed: restyle(model, controlnet, image, prompt, steps, seed=seed)


def isadca_with_prior(folder: Path, model: Model, weights: Path, steps: int) -> Draw:
    """The ablation of Fig. 4, row 4: DCA sees the image embedding that the prior expects of the prompt."""
    prior, encoder, tokenizer = load_prior(folder, model.dtype, model.device)
    if model.ip_adapter is None or model.ip_adapter.embed_dim != prior.config.embed_dim:
        path = find_extra(weights, "ip-adapter_sd15_vit-G.safetensors")
        if path is None:
            raise Problem(f"{weights}: the prior's embeddings are {prior.config.embed_dim} wide and need an IP-Adapter "
                          "that reads them; put ip-adapter_sd15_vit-G.safetensors in it or beside it")
        part = find_part(path, "ip_adapter", model.dtype)
        model = replace(model, ip_adapter=load_into(build(part), part, model.dtype, model.device))

    def draw(image: Image.Image, prompt: str, seed: int) -> Image.Image:
        embeds = embed_prompt(prior, encoder, tokenizer, prompt, seed=seed)
        return _vary(ISADCA, model, image, prompt, seed, steps, image_embeds=embeds)
    return draw


SYSTEMS = {system.name: system for system in [  # what is compared unless told otherwise
    System("rival", "RIVAL", replace(PRESETS["rival"], guidance=7.0), paper=(0.4488, 0.5851, 0.0133, 0.8772)),
    System("ip-adapter", "IP-Adapter", replace(PRESETS["ip-adapter"], guidance=7.0),
           paper=(0.5329, 0.2390, 0.0228, 0.7526)),
    System("image-variations", "SD image-variations", image_variations, "image-variations",
           (0.6401, 0.5248, 0.0212, 0.8545)),
    System("controlnet-shuffle", "ControlNet Shuffle", controlnet_shuffle, "controlnet-shuffle",
           (0.5410, 0.5458, 0.0307, 0.8029)),
    System("isadca", "Ours, λ = 0.7", ISADCA, paper=(0.5413, 0.5740, 0.0150, 0.8822)),
    System("isadca-0.5", "Ours, λ = 0.5", replace(ISADCA, lam=0.5)),
    System("isadca-attention", "Ours, attention mix", replace(ISADCA, mix="attention")),
    System("isadca-prior", "Ours, with prior", isadca_with_prior, "prior"),
]}


def find_extra(weights: Path, name: str) -> Path | None:
    """What a system or a metric needs beyond the model: `name` in the weights folder or beside it."""
    folder, models = inside(weights)
    return find(name, folder, models, folder.parent)


def lacks(system: System, model: Model, weights: Path) -> str:
    """Why a system is not available; empty if it is."""
    if system.needs and not find_extra(weights, system.needs):
        return f"has no {system.needs} in it or beside it"
    wants_image = system.method.wants_image if isinstance(system.method, Method) else system.needs == "prior"
    return "has no IP-Adapter" if wants_image and model.ip_adapter is None else ""


def make_draw(system: System, model: Model, weights: Path, steps: int = 50) -> Draw:
    """Load what the system needs and return what draws. Raises Problem for weights that are missing."""
    if isinstance(system.method, Method):
        method = system.method.check(model.schedule.config.train_steps, len(model.unet.sites) // 2)
        return lambda image, prompt, seed: _vary(method, model, image, prompt, seed, steps)
    folder = find_extra(weights, system.needs)
    if folder is None:
        raise Problem(f"{weights}: {lacks(system, model, weights)}, which the system {system.name} needs; see "
                      "weights/README.md, or leave it out of --systems")
    return system.method(folder, model, weights, steps)


def _vary(method: Method, model: Model, image: Image.Image, prompt: str, seed: int, steps: int,
          **options) -> Image.Image:
    """One variation from nothing: the reference is inverted where the method uses it."""
    wants_inversion = method.init != "random" or method.wants_reference(1000, 1000)
    ref = invert(model, image, steps) if wants_inversion else without_inversion(model, image, steps)
    return vary(model, ref, prompt, method, (seed,), **options)[0]
