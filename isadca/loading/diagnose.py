"""Why a weights file does not load, in one line. Imported only when one does not."""

import re
from pathlib import Path

from safetensors import SafetensorError

from ..common.problem import Problem
from ..networks.ip_adapter import IPAdapter
from .layouts import FLOATS, Header, Part, same_shape

ONLY_SD1, BASE_MODEL = "isadca implements Stable Diffusion 1.x", "give the base model with --weights"
# files that people try and that do not load: (a key that tells, what it is, what to do)
STRANGERS = [
    (r"^conditioner\.embedders\.|^add_embedding\.", "an SDXL model", ONLY_SD1),
    (r"^cond_stage_model\.model\.transformer\.resblocks\.", "an SD 2.x model", ONLY_SD1),
    (r"^controlnet_|^input_hint_block\.", "a ControlNet", BASE_MODEL),
]
UNKNOWN = [  # the same, for files in which no network was recognised
    (r"^lora_|\.lora[._]|^(unet|text_encoder)\..*_lora\.", "a LoRA", "merge it into a checkpoint first"),
    (r"^control_model\.", "a ControlNet", BASE_MODEL),
    (r"^adapter_modules\.|^image_proj_model\.", "an IP-Adapter training checkpoint",
     "convert it to the published layout: isadca convert FILE -o NAME.safetensors"),
    (r"^visual\.(conv1|transformer)\.", "a CLIP in OpenAI's or OpenCLIP's own layout",
     "get the one for transformers, with its config.json"),
]

OTHER_FORMATS = [  # (how such a file begins, what it is)
    (rb"PK|\x80\x02", "is a pickle, which can run code when it is opened; get the .safetensors version, or make it: "
                       "isadca convert FILE -o NAME.safetensors"),
    (rb"GGUF", "is a GGUF file; get the .safetensors version"),
    (rb"version ", "is a Git LFS pointer, not the file itself; run git lfs pull"),
    (rb"\Z", "is empty; download it again"),
    (rb"", "is not a whole safetensors file; download it again")]


def unreadable(path: Path, error: Exception) -> Problem:
    """Why a header cannot be read."""
    if not path.exists():
        return Problem(f"{path}: no such file; check the path, and that the model is complete")
    if path.is_dir():
        return Problem(f"{path}: is a folder, expected a .safetensors file")
    if not path.is_file():
        return Problem(f"{path}: is no regular file, expected a .safetensors file")
    if isinstance(error, SafetensorError | ValueError):
        with open(path, "rb") as file:
            start = file.read(8)
        what = next(what for pattern, what in OTHER_FORMATS if re.match(pattern, start))
        return Problem(f"{path}: {what} ({str(error)[:60]})")
    reason = getattr(error, "strerror", None) or error  # no permission; no memory to map it into
    return Problem(f"{path}: cannot be read ({reason}); check the file, or free memory")


def no_model(weights: Path) -> Problem:
    """A path of --weights that is neither a file nor a model's folder."""
    if not weights.exists():
        return Problem(f"{weights}: no such file or folder; --weights takes a diffusers folder or an LDM .safetensors")
    if not weights.is_dir():
        return unreadable(weights, OSError())
    inside = ", ".join(sorted(path.name for path in weights.glob("*.safetensors"))[:3])
    return Problem(f"{weights}: has no unet folder; --weights takes a diffusers folder or one .safetensors file"
                   + (f", such as {inside} in it" if inside else ""))


def no_safetensors(folder: Path) -> Problem:
    """A network's folder in which there is nothing to load."""
    if shards := sorted(folder.glob("*-of-*.safetensors")):
        return Problem(f"{folder}: {shards[0].name} is one file of several; get their .safetensors.index.json, too")
    pickles = [path for pattern in ("*.bin", "*.ckpt", "*.pth") for path in folder.glob(pattern)]
    if not pickles:
        return Problem(f"{folder}: no .safetensors file that may be read; get the .safetensors version")
    return Problem(f"{folder}: no .safetensors file, only {pickles[0].name}, a pickle, which can run code when it is "
                   f"opened; get the .safetensors version, or make it: isadca convert {pickles[0]} -o "
                   f"{pickles[0].with_suffix('.safetensors')}")


def _stranger(header: Header, known: list) -> Problem | None:
    for pattern, what, remedy in known:
        if any(re.search(pattern, key) for key in header.tensors):
            return Problem(f"{header.path}: is {what}; {remedy}")
    return None


def unknown(header: Header) -> Problem:
    """A file in which no network was recognised."""
    example = min(header.tensors, default="no tensors at all")[:80]
    return _stranger(header, STRANGERS + UNKNOWN) or Problem(
        f"{header.path}: none of the layouts that isadca knows (it holds {len(header.tensors)} tensors, e.g. "
        f"{example}); see the README for where to get the files")


def lacking(parts: dict[str, Part], kind: str) -> Problem:
    """A file that was recognised and does not hold the network `kind`."""
    header = next(iter(parts.values())).header
    whole = kind == "unet" or "unet" in parts and len(parts) > 1
    asked = f" but no {kind}; --weights takes the whole model" if whole else f", expected {kind}"
    return _stranger(header, STRANGERS) or Problem(f"{header.path}: holds {', '.join(parts)}{asked}")


def mismatch(expected: dict[str, tuple[int, ...]], part: Part) -> Problem:
    """ONE Problem that lists missing, unexpected and misshapen tensors and guesses the cause."""
    if other := _stranger(part.header, STRANGERS):
        return other
    for key, stored in part.tensors.items():
        if stored.dtype not in FLOATS:  # fp8, int8: their scales are elsewhere, or lost
            return Problem(f"{part.path}: {_with_origin(key, part)} is {stored.dtype}, expected {', '.join(FLOATS)}; "
                           "get the fp16 version")
    shapes = part.shapes
    both = expected.keys() & shapes.keys()
    misshapen = {key: f" is {list(shapes[key])}, expected {list(expected[key])}" for key in both
                 if not same_shape(shapes[key], expected[key])}
    details = []
    for word, keys in [("missing", expected.keys() - both), ("unexpected", shapes.keys() - both),
                       ("misshapen", misshapen.keys())]:
        named = [_with_origin(key, part) + misshapen.get(key, "") for key in sorted(keys)[:3]]
        if keys:
            details.append(f"{len(keys)} {word}: {', '.join(named)}{', ...' if len(keys) > 3 else ''}")
    return Problem(f"{part.path}: {part.kind} (layout: {part.layout}) does not fit: {'; '.join(details)}. "
                   f"{_guess(part)}")


def _with_origin(key: str, part: Part) -> str:
    theirs = part.tensors[key].name if key in part.tensors else key
    return key[:80] if theirs == key else f"{key[:80]} (from {theirs[:80]})"


def _guess(part: Part) -> str:
    """The usual reasons, which two shapes give away."""
    inputs = part.shapes.get("conv_in.weight", ())[1:2]
    context = part.shapes.get("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", ())[1:2]
    if part.kind == "unet" and inputs not in ((), (4,)):
        return f"Its UNet has {inputs[0]} input channels: an inpainting or editing model; get the plain SD 1.x one."
    if part.kind == "unet" and context in ((1024,), (2048,)):
        family = "2.x" if context[0] == 1024 else "XL"
        return f"Its context is {context[0]} wide, SD 1.x has 768: this is an SD {family} model."
    return "Is it complete, with its own config.json?"


def unknown_adapter(part: Part, error: Exception) -> Problem:
    return Problem(f"{part.path}: an IP-Adapter of no published layout ({str(error)[:80]} is missing or misshapen); "
                   "isadca reads ip-adapter_sd15 and its light, plus, plus-face, full-face and vit-G variants")


def unfit_adapter(part: Part, expected: dict[str, tuple], actual: dict[str, tuple]) -> Problem:
    """An IP-Adapter whose layers are not those of the UNet."""
    key = next(k for k in sorted(expected.keys() | actual.keys()) if expected.get(k) != actual.get(k))
    return Problem(f"{part.path}: made for another UNet ({key} is {actual.get(key)}, this UNet needs "
                   f"{expected.get(key)}); SD 1.5 takes the ip-adapter*_sd15 files")


def unfit_encoder(part: Part, adapter: IPAdapter, encoder: Part, gives: int) -> Problem:
    """An IP-Adapter that reads features of another width than the image encoder's."""
    h, big_g = "ViT-H, h94's models/image_encoder", "ViT-bigG, h94's sdxl_models/image_encoder"
    needs = {1024: h, 1280: h if adapter.reads_patches else big_g}.get(adapter.embed_dim, "another encoder")
    return Problem(f"{part.path}: reads {adapter.embed_dim}-wide image features, but {encoder.path} gives {gives}; it "
                   f"needs {needs} (--image-encoder)")
