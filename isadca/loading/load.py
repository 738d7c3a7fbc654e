"""From a path to a loaded model: find the parts of a weights folder or file, build each network, check the fit."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..common.problem import Problem
from ..ddim import Schedule, ScheduleConfig
from ..networks.clip import CLIPText, CLIPVision
from ..networks.ip_adapter import IPAdapter, numbered
from ..networks.model import Model
from ..networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from ..networks.tokenizer import Tokenizer
from ..networks.unet import UNet
from ..networks.vae import VAE
from .checkpoints import Part, explain_mismatch, load_into, recognise, without_values
from .config_json import read_config

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}

# image encoders that are published without their config.json, by width
KNOWN_ENCODERS = {1280: CLIPVisionConfig(),
                  1664: CLIPVisionConfig(width=1664, layers=48, mlp_width=8192, projection_dim=1280),
                  1024: CLIPVisionConfig(width=1024, layers=24, mlp_width=4096, projection_dim=768, act="quick_gelu")}


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Python's garbage collector pauses: loading makes a hundred thousand objects, none of them garbage, and walking
    through them and all that torch imported took a fifth of it (0.38 -> 0.30 s at SD1.5's size)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collecting()
def load(weights: str | Path | None = None, ip_adapter: str | Path | None = None,
         image_encoder: str | Path | None = None, vae: str | Path | None = None, device: str = "auto",
         dtype: str | torch.dtype = "auto") -> Model:
    """Load a diffusers folder or an LDM single file; without `weights`, the demo checkpoint.

    `ip_adapter` and `image_encoder` are found inside or beside the weights when they are not given;
    "none" does without either. `vae` replaces the autoencoder. Raises Problem where something does not fit.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    weights = Path(weights) if weights else default_weights()
    found = find_parts(weights, dtype)
    if vae:
        found["vae"] = find_part(Path(vae), "vae", dtype)
    adapter_file = find_adapter(weights, ip_adapter)
    if adapter_file:
        found["ip_adapter"] = find_part(adapter_file, "ip_adapter", dtype)
        encoder = _encoder_path(weights, adapter_file, image_encoder)
        if encoder:
            found["vision"] = find_part(encoder, "vision", dtype)
    if not adapter_file:
        found.pop("vision", None)  # nothing would use it
    networks = {kind: load_into(build(part), part, vae_dtype(dtype) if kind == "vae" else dtype, device)
                for kind, part in found.items()}
    _check_fit(networks, found)
    text = networks["text"]
    folder = weights if weights.is_dir() else weights.parent
    schedule = Schedule(read_config(ScheduleConfig, folder / "scheduler" / "scheduler_config.json"))
    return Model(**{"vision": None, "ip_adapter": None} | networks, tokenizer=load_tokenizer(weights, text.config),
                 schedule=schedule, device=device, dtype=dtype, files={kind: part.path for kind, part in found.items()})


def default_weights() -> Path:
    """The demo checkpoint: in the repository's weights/, or inside an installed package."""
    here = Path(__file__).parent.parent
    for root in (here.parent / "weights", here / "_weights"):
        if (root / "demo").is_dir():
            return root / "demo"
    raise Problem("weights/demo is not here; give a model with --weights")


def find_parts(weights: Path, dtype: torch.dtype) -> dict[str, Part]:
    """The UNet, VAE and text encoder (and image encoder, if any) of a diffusers folder or an LDM single file."""
    if not weights.exists():
        raise Problem(f"{weights}: no such file or folder; --weights takes a diffusers folder or an LDM .safetensors")
    if weights.is_dir() and not (weights / "unet").is_dir():
        inside = ", ".join(sorted(p.name for p in weights.glob("*.safetensors"))[:3])
        raise Problem(f"{weights}: has no unet folder; --weights takes a diffusers folder or one .safetensors file"
                      + (f", such as {inside} in it" if inside else ""))
    if weights.is_dir():
        found = {kind: find_part(weights / name, kind, dtype) for kind, name in FOLDERS.items()
                 if kind != "vision" or (weights / name).is_dir()}
    else:
        found = {part.kind: part for part in recognise(weights)}
    for kind in ("unet", "vae", "text"):
        if kind not in found:
            raise Problem(f"{weights}: holds {', '.join(found)} but no {kind}; --weights takes the whole model")
    return found


def find_part(path: Path, kind: str, dtype: torch.dtype) -> Part:
    """The network `kind` in a file, or in a folder with one safetensors file per precision."""
    if path.is_dir():
        path = pick_file(path, dtype)
    for part in recognise(path):
        if part.kind == kind:
            return part
    raise Problem(f"{path}: holds {', '.join(p.kind for p in recognise(path))}, expected {kind}")


def pick_file(folder: Path, dtype: torch.dtype) -> Path:
    """model.safetensors or model.fp16.safetensors, whichever is nearer to the wanted precision."""
    files = [p for p in sorted(folder.glob("*.safetensors")) if "non_ema" not in p.name]
    if not files:
        pickles = [p for pattern in ("*.bin", "*.ckpt", "*.pth") for p in folder.glob(pattern)]
        raise Problem(f"{folder}: no .safetensors file" + (f", only {pickles[0].name}, a pickle, which can run code "
                      f"when it is opened; get the .safetensors version, or make it: isadca convert {pickles[0]} -o "
                      f"{pickles[0].with_suffix('.safetensors')}" if pickles else "; get the .safetensors version"))
    half = dtype in (torch.float16, torch.bfloat16)
    return min(files, key=lambda p: ((".fp16." in p.name) != half, len(p.name)))


def find_adapter(weights: Path, given: str | Path | None) -> Path | None:
    """The IP-Adapter file: the one given, or the one inside the weights folder (the base variant, if several)."""
    if given and str(given) == "none":
        return None
    if given:
        return Path(given)
    folder = weights if weights.is_dir() else weights.parent
    files = sorted([*folder.glob("ip-adapter*.safetensors"), *folder.glob("models/ip-adapter*.safetensors")],
                   key=lambda p: len(p.name))
    return files[0] if files else None


def _encoder_path(weights: Path, adapter: Path, given: str | Path | None) -> Path | None:
    if given and str(given) == "none":
        return None
    if given:
        return Path(given)
    beside = [weights, adapter.parent, adapter.parent.parent / "models"]
    if "vit-G" in adapter.name:
        beside.insert(0, adapter.parent.parent / "sdxl_models")
    return next((p / "image_encoder" for p in beside if (p / "image_encoder").is_dir()), None)


def build(part: Part) -> nn.Module:
    """The network of `part` on the meta device, its sizes from the config.json beside the file (or SD1.5's)."""
    config = part.path.parent / "config.json"
    with without_values():
        if part.kind == "unet":
            return UNet(read_config(UNetConfig, config))
        if part.kind == "vae":
            return VAE(read_config(VAEConfig, config))
        if part.kind == "text":
            return CLIPText(read_config(CLIPTextConfig, config))
        if part.kind == "vision":
            widths = part.shapes.get("vision_model.pre_layrnorm.weight", ())
            known = KNOWN_ENCODERS.get(max(widths, default=0), CLIPVisionConfig())
            return CLIPVision(read_config(CLIPVisionConfig, config) if config.is_file() else known)
        try:
            return IPAdapter(part.shapes)
        except (KeyError, ValueError, IndexError) as error:
            raise Problem(f"{part.path}: an IP-Adapter of no published layout ({error} is missing or misshapen); "
                          "isadca reads ip-adapter_sd15 and its light, plus, plus-face, full-face and vit-G "
                          "variants") from None


def _check_fit(networks: dict, found: dict[str, Part]) -> None:
    """Parts may load one by one and still not belong together; say which does not."""
    unet, text, adapter, vision = (networks.get(k) for k in ("unet", "text", "ip_adapter", "vision"))
    if text.config.width != unet.config.context_dim:
        raise Problem(f"{found['text'].path}: a text encoder of width {text.config.width}, the UNet expects "
                      f"{unet.config.context_dim}; they belong to different models")
    if adapter is None:
        return
    expected = {f"ip_adapter.{number}.to_k_ip.weight":
                (unet.get_submodule(site.name).to_q.out_features, unet.config.context_dim)
                for number, site in numbered(unet.sites).items()}
    actual = {key: shape for key, shape in found["ip_adapter"].shapes.items() if key.endswith("to_k_ip.weight")}
    if actual != expected:
        key = next(k for k in sorted(expected.keys() | actual.keys()) if expected.get(k) != actual.get(k))
        raise Problem(f"{found['ip_adapter'].path}: made for another UNet ({key} is {actual.get(key)}, this UNet needs "
                      f"{expected.get(key)}); SD 1.5 takes the ip-adapter*_sd15 files")
    if vision is not None:
        gives = vision.config.width if adapter.reads_patches else vision.config.projection_dim
        if gives != adapter.embed_dim:
            needs = {1024: "ViT-H, h94's models/image_encoder",
                     1280: "ViT-H, h94's models/image_encoder" if adapter.reads_patches
                     else "ViT-bigG, h94's sdxl_models/image_encoder"}.get(adapter.embed_dim, "another encoder")
            raise Problem(f"{found['ip_adapter'].path}: reads {adapter.embed_dim}-wide image features, but "
                          f"{found['vision'].path} gives {gives}; it needs {needs} (--image-encoder)")


def load_tokenizer(weights: Path, config: CLIPTextConfig) -> Tokenizer:
    """The folder's own vocabulary, or CLIP's from weights/tokenizer for files that carry none."""
    folder = weights / "tokenizer"
    if not folder.is_dir():
        folder = default_weights().parent / "tokenizer"
    tokenizer = Tokenizer.from_folder(folder, config.max_tokens)
    if tokenizer.end_id != config.vocab_size - 1:
        raise Problem(f"{folder}: a vocabulary of {tokenizer.end_id + 1} tokens, the text encoder has "
                      f"{config.vocab_size}; they belong to different models")
    return tokenizer


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name).cpu()  # "meta" would be accepted otherwise
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
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
    """The VAE overflows in fp16."""
    return torch.float32 if dtype == torch.float16 else dtype


def parts_of(path: Path) -> list[Part]:
    """Every part that a file, a model folder, or a folder of safetensors files holds; each checked to load.

    Raises Problem for the first that would not.
    """
    if not path.is_dir():
        parts = recognise(path)
    elif (path / "unet").is_dir():
        adapter = find_adapter(path, None)
        parts = [*find_parts(path, torch.float32).values(), *(recognise(adapter) if adapter else [])]
    else:
        parts = [part for file in sorted(path.glob("*.safetensors")) for part in recognise(file)]
        if not parts:
            raise Problem(f"{path}: no unet folder and no .safetensors files in it")
    for part in parts:
        explain_mismatch({key: tuple(t.shape) for key, t in build(part).state_dict().items()}, part)
    return parts
