"""From a path to a loaded model, in one direction: locate the files, read their headers, build the networks, fill them,
check that they belong together."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..common.problem import Problem
from ..networks.clip import CLIPText, CLIPVision
from ..networks.ip_adapter import IPAdapter, numbered
from ..networks.model import Model
from ..networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from ..networks.tokenizer import Tokenizer
from ..networks.unet import UNet
from ..networks.vae import VAE
from .checkpoints import Part, load_into, recognise, without_values
from .config_json import read_config, read_schedule

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}
NETWORKS = {"unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig), "text": (CLIPText, CLIPTextConfig),
            "vision": (CLIPVision, CLIPVisionConfig)}
DEPTHS = [("layers", r"\w+\.encoder\.layers\.(\d{1,4})\."), ("channels", r"(?:encoder\.)?down_blocks\.(\d{1,4})\."),
          ("layers_per_block", r"(?:encoder\.)?down_blocks\.0\.resnets\.(\d{1,4})\.")]
PUBLISHED_NAMES = r"(diffusion_pytorch_)?model\."
SHARD = r"-\d{5}-of-\d{5}"  # one file of several; the index.json beside them lists all

# image encoders that are published without their config.json, by width
KNOWN_ENCODERS = {1280: CLIPVisionConfig(),
                  1664: CLIPVisionConfig(width=1664, layers=48, mlp_width=8192, projection_dim=1280),
                  1024: CLIPVisionConfig(width=1024, layers=24, mlp_width=4096, projection_dim=768, act="quick_gelu")}


def load(weights: str | Path | None = None, ip_adapter: str | Path | None = None,
         image_encoder: str | Path | None = None, vae: str | Path | None = None, device: str = "auto",
         dtype: str | torch.dtype = "auto") -> Model:
    """Load a diffusers folder or an LDM single file; without `weights`, the demo checkpoint.

    `ip_adapter` and `image_encoder` are found inside or beside the weights when they are not given;
    "none" does without either. `vae` replaces the autoencoder. Raises Problem where something does not fit.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    weights = Path(weights) if weights else default_weights()
    parts = read_parts(locate(weights, ip_adapter, image_encoder, vae), precision)
    networks = {kind: load_into(build(part), part, vae_dtype(precision) if kind == "vae" else precision, place)
                for kind, part in parts.items()}
    _check_fit(networks, parts)
    text = networks["text"]
    schedule = read_schedule(folder_of(weights) / "scheduler" / "scheduler_config.json")
    return Model(**{"vision": None, "ip_adapter": None} | networks, tokenizer=load_tokenizer(weights, text.config),
                 schedule=schedule, device=place, dtype=precision, files=files_of(parts))


# ---- locate ------------------------------------------------------------------------------------------------------

def find(name: str, *places: Path) -> Path | None:
    """`name`, which may be a pattern, in the first place that has it. Of several, the shortest: the plain variant."""
    for place in places:
        if found := sorted(place.glob(name), key=lambda path: (len(path.name), path.name)):
            return found[0]
    return None


def folder_of(weights: Path) -> Path:
    return weights if weights.is_dir() else weights.parent


def default_weights() -> Path:
    """The demo checkpoint: in the repository's weights/, or inside an installed package."""
    package = Path(__file__).parent.parent
    found = find("demo", package.parent / "weights", package / "_weights")
    if not found:
        raise Problem("weights/demo is not here; give a model with --weights")
    return found


def locate(weights: Path, ip_adapter: str | Path | None = None, image_encoder: str | Path | None = None,
           vae: str | Path | None = None) -> dict[str, Path]:
    """The file or folder of each network that a run needs. Raises Problem where there is no model."""
    if not weights.exists():
        raise Problem(f"{weights}: no such file or folder; --weights takes a diffusers folder or an LDM .safetensors")
    if weights.is_dir() and not (weights / "unet").is_dir():
        inside = ", ".join(sorted(p.name for p in weights.glob("*.safetensors"))[:3])
        raise Problem(f"{weights}: has no unet folder; --weights takes a diffusers folder or one .safetensors file"
                      + (f", such as {inside} in it" if inside else ""))
    places = {kind: weights / FOLDERS[kind] if weights.is_dir() else weights for kind in ("unet", "vae", "text")}
    if vae:
        places["vae"] = Path(vae)
    adapter = find_adapter(weights, ip_adapter)
    if adapter:
        places["ip_adapter"] = adapter
        encoder = find_encoder(weights, adapter, image_encoder)
        if encoder:
            places["vision"] = encoder
    return places


def find_adapter(weights: Path, given: str | Path | None) -> Path | None:
    """The IP-Adapter file: the one given, or the one inside the weights folder (the base variant, if several)."""
    if given:
        return None if str(given) == "none" else Path(given)
    folder = folder_of(weights)
    return find("ip-adapter*.safetensors", folder, folder / "models")


def find_encoder(weights: Path, adapter: Path, given: str | Path | None) -> Path | None:
    """The image encoder that an adapter reads: the one given, or beside either file as h94's repository has it."""
    if given:
        return None if str(given) == "none" else Path(given)
    h94 = adapter.parent.parent
    big_g = [h94 / "sdxl_models"] if "vit-G" in adapter.name else []
    return find("image_encoder", *big_g, weights, adapter.parent, h94 / "models")


def pick_file(folder: Path, dtype: torch.dtype) -> Path:
    """model.safetensors or model.fp16.safetensors, whichever is nearer to the wanted precision; or its index.json."""
    files = [path for pattern in ("*.safetensors", "*.safetensors.index*.json") for path in sorted(folder.glob(pattern))
             if "non_ema" not in path.name and not re.search(SHARD, path.name)]
    if not files:
        from .diagnose import no_safetensors
        raise no_safetensors(folder)
    half = dtype in (torch.float16, torch.bfloat16)
    return min(files, key=lambda path: (not re.match(PUBLISHED_NAMES, path.name), (".fp16." in path.name) != half,
                                        len(path.name)))


# ---- headers -----------------------------------------------------------------------------------------------------

def read_parts(places: dict[str, Path], dtype: torch.dtype) -> dict[str, Part]:
    return {kind: find_part(place, kind, dtype) for kind, place in places.items()}


def find_part(path: Path, kind: str, dtype: torch.dtype) -> Part:
    """The network `kind` in a file, or in a folder with one safetensors file per precision."""
    path = pick_file(path, dtype) if path.is_dir() else path
    parts = {part.kind: part for part in recognise(path)}
    if kind not in parts:
        from .diagnose import lacking
        raise lacking(path, list(parts), kind)
    return parts[kind]


def files_of(parts: dict[str, Part]) -> dict[str, Path]:
    """The file of each network, and of one in several files the others by name."""
    shards = {path.name: path for part in parts.values() for path in part.files if path != part.path}
    return {kind: part.path for kind, part in parts.items()} | shards


# ---- build and check ---------------------------------------------------------------------------------------------

def build(part: Part) -> Any:
    """The network of `part` on the meta device, its sizes from the config.json beside the file (or SD1.5's)."""
    with without_values():
        if part.kind != "ip_adapter":
            return NETWORKS[part.kind][0](_sizes(part))
        try:
            if deepest(part, r"image_proj\.layers\.(\d+)\.") > len(part.tensors):
                raise ValueError("a layer")
            return IPAdapter(part.shapes)
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            from .diagnose import unknown_adapter
            raise unknown_adapter(part, error) from None


def _sizes(part: Part):
    """What the config.json says, where it promises no more layers than the file holds; else building would not end."""
    path, kind = part.path.parent / "config.json", part.kind
    config = read_config(NETWORKS[kind][1], path)
    if kind == "vision" and not path.is_file():
        width = max(part.shapes.get("vision_model.pre_layrnorm.weight", ()), default=0)
        if width not in KNOWN_ENCODERS:
            raise Problem(f"{part.path}: an image encoder {width} wide without its config.json, which tells its heads "
                          "and activation; put that beside it")
        config = KNOWN_ENCODERS[width]
    if kind == "text":  # whatever the config.json says of it
        config = replace(config, projection_dim=(part.shapes.get("text_projection.weight") or (None,))[0])
    for field, pattern in DEPTHS:
        size = getattr(config, field, 0)
        asked, held = len(size) if isinstance(size, tuple) else size, deepest(part, pattern)
        if asked > held:
            from .diagnose import too_deep
            raise too_deep(part, field, asked, held)
    return config


def deepest(part: Part, pattern: str) -> int:
    """How many layers a file's names count up to."""
    return max((1 + int(found[1]) for key in part.tensors if (found := re.match(pattern, key))), default=0)


def _check_fit(networks: dict, parts: dict[str, Part]) -> None:
    """Parts may load one by one and still not fit together; say which does not."""
    unet, text, adapter, vision = (networks.get(k) for k in ("unet", "text", "ip_adapter", "vision"))
    if text.config.width != unet.config.context_dim:
        raise Problem(f"{parts['text'].path}: a text encoder of width {text.config.width}, the UNet expects "
                      f"{unet.config.context_dim}; they belong to different models")
    if adapter is None:
        return
    expected = {f"ip_adapter.{number}.to_k_ip.weight":
                (unet.get_submodule(site.name).to_q.out_features, unet.config.context_dim)
                for number, site in numbered(unet.sites).items()}
    actual = {key: shape for key, shape in parts["ip_adapter"].shapes.items() if key.endswith("to_k_ip.weight")}
    if actual != expected:
        from .diagnose import unfit_adapter
        raise unfit_adapter(parts["ip_adapter"], expected, actual)
    if vision is not None:
        gives = vision.config.width if adapter.reads_patches else vision.config.projection_dim
        if gives != adapter.embed_dim:
            from .diagnose import unfit_encoder
            raise unfit_encoder(parts["ip_adapter"], adapter, parts["vision"], gives)


def load_tokenizer(weights: Path, config: CLIPTextConfig) -> Tokenizer:
    """The folder's own vocabulary, or CLIP's from weights/tokenizer for files that carry none."""
    folder = find("tokenizer", weights) or default_weights().parent / "tokenizer"
    tokenizer = Tokenizer.from_folder(folder, config.max_tokens)
    if tokenizer.end_id != config.vocab_size - 1:
        raise Problem(f"{folder}: a vocabulary of {tokenizer.end_id + 1} tokens, the text encoder has "
                      f"{config.vocab_size}; they belong to different models")
    return tokenizer


# ---- device and precision ----------------------------------------------------------------------------------------

def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name).cpu()  # "meta" would be accepted otherwise
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # torch.hpu is a module of others
        raise Problem(f"device {name!r} is not available here; try --device cpu") from None


def _dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """auto: half precision on CUDA, float32 elsewhere (on most CPUs bfloat16 is a trap: twice as slow)."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
    if name not in names:
        raise Problem(f"dtype is {name!r}, expected auto, {', '.join(names)}")
    return names[name]


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE overflows in fp16. In bf16 it alone cost more than the rest: 0.9 grey levels on average, up to 43."""
    return torch.float32 if dtype.itemsize == 2 else dtype
