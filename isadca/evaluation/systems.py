"""The systems of the paper's Table 1 and Fig. 4, as values: a reference, a prompt and a seed become a picture.

A system is a Method of the loop, or a function that prepares something else; examples/counterparts has three of those.
All have the paper's T = 50 and m = 7, and where the paper says nothing, their authors' settings.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import getfile, isfunction
from pathlib import Path

import torch
from PIL import Image

from ..common.files import sha256
from ..common.images import fit
from ..common.problem import Problem
from ..loading.load import find, folder_of, inside
from ..loop import vary
from ..methods import ISADCA, PRESETS, Method
from ..networks.model import Model
from ..reference import Reference, invert

Draw = Callable[[Image.Image, str, int], Image.Image]  # reference, prompt, seed -> variation
Prepare = Callable[[Path, Model, Path, int], Draw]     # the folder it needs, model, weights, steps -> what draws


@dataclass(frozen=True)
class System:
    """One row of the table. In a file of your own it is given to `isadca evaluate --systems` as FILE.py:NAME."""

    name: str                         # in results.csv and in the names of files
    label: str                        # in tables and sheets
    method: Method | Prepare          # of the loop; or what loads a system that is not the loop
    needs: str = ""                   # a folder of its own weights, in the model's or beside it
    paper: tuple[float, ...] = ()     # its row in the paper's Table 1: LPIPS, SSIM, SIFID, CLIP similarity
    code: str = ""                    # sha256 of the user's own code

    @property
    def deterministic(self) -> bool:
        """Whether every seed gives the same picture."""
        return isinstance(self.method, Method) and self.method.deterministic


SYSTEMS = {system.name: system for system in [  # what is compared unless told otherwise
    System("rival", "RIVAL", replace(PRESETS["rival"], guidance=7.0), paper=(0.4488, 0.5851, 0.0133, 0.8772)),
    System("ip-adapter", "IP-Adapter", replace(PRESETS["ip-adapter"], guidance=7.0),
           paper=(0.5329, 0.2390, 0.0228, 0.7526)),
    System("isadca", "Ours, λ = 0.7", ISADCA, paper=(0.5413, 0.5740, 0.0150, 0.8822)),
    System("isadca-0.5", "Ours, λ = 0.5", replace(ISADCA, lam=0.5)),
    System("isadca-attention", "Ours, attention mix", replace(ISADCA, mix="attention")),
]}


# ---- from what a user names ----------------------------------------------------------------------------------------

def system_of(value: str | Method | Callable | System) -> System:
    """A System; a name of SYSTEMS or of a preset (at the paper's guidance); a Method; or a function Controls ->
    Attend, which becomes the default method's `mix`. Raises Problem for what is none of them."""
    if isinstance(value, System):
        return value
    if isinstance(value, Method):
        return _of_method(value)
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        return System(name, name, replace(ISADCA, name=name, mix=value))
    if value in SYSTEMS:
        return SYSTEMS[value]
    if value not in PRESETS:
        others = [preset for preset in PRESETS if preset not in SYSTEMS]
        raise Problem(f"system is {value!r}, expected one of {', '.join([*SYSTEMS, *others])}")
    return System(value, value, replace(PRESETS[value], guidance=7.0))


def _of_method(method: Method) -> System:
    """A preset with other values is named after what differs, such as isadca:lam=0.3."""
    if method.name not in PRESETS:
        return System(method.name, method.name, method)
    known = system_of(method.name)
    differs = [f"{field.name}={getattr(method, field.name)}" for field in fields(Method)
               if field.name != "source" and getattr(method, field.name) != getattr(known.method, field.name)]
    name = f"{method.name}:{':'.join(differs)}"
    return System(name, name, method) if differs else known


# ---- what draws ----------------------------------------------------------------------------------------------------

def find_extra(weights: Path, name: str) -> Path | None:
    """What a system or a metric needs beyond the model: `name` in the weights folder or beside it."""
    folder, models = inside(weights)
    return find(name, folder, models, folder.parent)


def lacks(system: System, model: Model, weights: Path) -> str:
    """Why a system is not available; empty if it is."""
    if system.needs and not find_extra(weights, system.needs):
        return f"has no {system.needs} in it or beside it"
    wants_image = isinstance(system.method, Method) and system.method.wants_image
    return "has no IP-Adapter" if wants_image and model.ip_adapter is None else ""


def make_draw(system: System, model: Model, weights: Path, steps: int | None = None) -> Draw:
    """Load what the system needs and return what draws. Raises Problem for weights that are missing."""
    method = system.method
    if isinstance(method, Method):
        checked = method.check(model.schedule.config.train_steps, len(model.unet.sites) // 2)
        return lambda image, prompt, seed: vary_once(checked, model, image, prompt, seed, steps or checked.steps)
    folder = find_extra(weights, system.needs) if system.needs else folder_of(weights)
    if folder is None:
        raise Problem(f"{weights}: {lacks(system, model, weights)}, which the system {system.name} needs; see "
                      "weights/README.md, or leave it out of --systems")
    draw = method(folder, model, weights, steps or Method.steps)
    if not callable(draw):
        raise Problem(f"{system.name}: its function returned {type(draw).__name__}, expected a function (reference, "
                      "prompt, seed) -> picture")
    return draw


def vary_once(method: Method, model: Model, image: Image.Image, prompt: str, seed: int, steps: int,
              **options) -> Image.Image:
    """One variation from nothing: the reference is inverted where the method uses it."""
    wants_inversion = method.init != "random" or method.wants_reference(1000, 1000)
    ref = invert(model, image, steps) if wants_inversion else without_inversion(model, image, steps)
    return vary(model, ref, prompt, method, (seed,), **options)[0]


def without_inversion(model: Model, image: Image.Image, steps: int) -> Reference:
    """A reference with zeros as its chain, for a method that starts at noise and reads no keys and values of it."""
    side = model.unet.config.sample_size
    chain = torch.zeros(steps + 1, 4, side, side, device=model.device, dtype=model.latent_dtype)
    return Reference(fit(image, (model.size, model.size)), chain, original=image)


# ---- what tells systems apart --------------------------------------------------------------------------------------

def system_fingerprint(system: System) -> str:
    """What a system does, apart from the package's code: the values of its method, and the user's own code."""
    if not isinstance(system.method, Method):
        return repr((system.name, system.code or _code_of(system.method)))
    values = {field.name: getattr(system.method, field.name) for field in fields(Method)
              if field.name not in ("name", "source")}
    own = {name: value for name, value in values.items() if callable(value) and not is_dataclass(value)}
    code = system.code or [_code_of(function) for function in own.values()]
    return repr([(name, value) for name, value in values.items() if name not in own] + [list(own), code])


def _code_of(function: Callable) -> tuple:
    """What tells a function from another: its source file, its name, and what it closes over."""
    maker = function if isfunction(function) else type(function)
    try:
        source = sha256(Path(getfile(maker)))
    except (TypeError, OSError):  # typed in a notebook, or not Python: never taken for an earlier one
        source = object.__repr__(function)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    plain = (bool, int, float, str, type(None))
    return source, maker.__qualname__, [x if isinstance(x, plain) else object.__repr__(x) for x in cells]
