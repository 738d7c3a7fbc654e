"""From a path to a loaded model, in one direction: locate the files, read their headers, build, fill, check."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..common.device import device_named, dtype_named, vae_dtype
from ..common.problem import Problem, expect
from ..networks.clip import CLIPText, CLIPVision
from ..networks.ip_adapter import IPAdapter, numbered
from ..networks.model import Model
from ..networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from ..networks.tokenizer import Tokenizer
from ..networks.unet import UNet
from ..networks.vae import VAE
from .checkpoints import load_into, recognise, without_values
from .config_json import read_config, read_schedule
from .layouts import Part

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder", "prior": "prior"}
NETWORKS = {"unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig), "text": (CLIPText, CLIPTextConfig),
            "vision": (CLIPVision, CLIPVisionConfig)}
NETWORK_FILE = r"(?!.*(?:non_ema|-\d{5}-of-\d{5})).*\.safetensors(\.index.*\.json)?$"  # no single shard


def load(weights: str | Path | None = None, ip_adapter: str | Path | None = None,
         image_encoder: str | Path | None = None, vae: str | Path | None = None, device: str = "auto",
         dtype: str | torch.dtype = "auto", compile: bool = False) -> Model:
    """Load a diffusers folder or an LDM single file; without `weights`, the demo checkpoint.

    `ip_adapter` and `image_encoder` are found inside or beside the weights when they are not given; "none" leaves
    either out. `vae` replaces the autoencoder. `compile` compiles the UNet at its first calls; it then gives no
    gradients. Raises Problem where something does not fit.
    """
    place = device_named(device)
    precision = dtype_named(dtype, place)
    expect("weights", weights, str | Path | None, "a path")
    weights = default_weights() if weights is None else Path(weights)
    parts = read_parts(locate(weights, ip_adapter, image_encoder, vae), precision)
    networks = {kind: load_into(build(part), part, vae_dtype(precision) if kind == "vae" else precision, place)
                for kind, part in parts.items()}
    _check_fit(networks, parts)
    shards = {path.name: path for part in parts.values() for path in part.files if path != part.path}
    model = Model(**{"vision": None, "ip_adapter": None} | networks,
                  tokenizer=load_tokenizer(weights, networks["text"].config),
                  schedule=read_schedule(folder_of(weights) / "scheduler" / "scheduler_config.json"),
                  device=place, dtype=precision, files={kind: part.path for kind, part in parts.items()} | shards)
    if not compile:
        return model
    from ..speed.compiled import compile_model
    return compile_model(model)


# ---- locate and read headers -------------------------------------------------------------------------------------

def find(name: str, *places: Path) -> Path | None:
    """`name`, which may be a pattern, in the first place that has it. Of several, the shortest: the plain variant."""
    for place in places:
        if found := sorted(place.glob(name), key=lambda path: (len(path.name), path.name)):
            return found[0]
    return None


def folder_of(weights: Path) -> Path:
    return weights if weights.is_dir() else weights.parent


def inside(weights: Path) -> tuple[Path, Path]:
    """Where a model's own extras lie: in its folder, or in the models/ that h94's repository has."""
    return folder_of(weights), folder_of(weights) / "models"


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
    if not weights.is_file() and not (weights / "unet").is_dir():
        from .diagnose import no_model
        raise no_model(weights)
    places = {kind: weights / FOLDERS[kind] if weights.is_dir() else weights for kind in ("unet", "vae", "text")}
    if vae:
        places["vae"] = Path(vae)
    adapter = Path(ip_adapter) if ip_adapter else find("ip-adapter*.safetensors", *inside(weights))
    if adapter and str(adapter) != "none":
        places["ip_adapter"] = adapter
        encoder = Path(image_encoder) if image_encoder else find_encoder(weights, adapter)
        if encoder and str(encoder) != "none":
            places["vision"] = encoder
    return places


def find_encoder(weights: Path, adapter: Path) -> Path | None:
    """The image encoder that an adapter reads, beside either of them as h94's repository has it."""
    h94 = adapter.parent.parent
    big_g = [h94 / "sdxl_models"] if "vit-G" in adapter.name else []
    return find("image_encoder", *big_g, weights, adapter.parent, h94 / "models")


def find_tokenizer(weights: Path) -> Path:
    """The folder's own vocabulary, or CLIP's from weights/tokenizer for files that carry none."""
    return find("tokenizer", weights) or default_weights().parent / "tokenizer"


def pick_file(folder: Path, dtype: torch.dtype) -> Path:
    """model.safetensors or model.fp16.safetensors, whichever is nearer to the wanted precision; or its index.json."""
    files = [path for path in sorted(folder.glob("*.safetensors*")) if re.match(NETWORK_FILE, path.name)]
    if not files:
        from .diagnose import no_safetensors
        raise no_safetensors(folder)
    published = ("model.", "diffusion_pytorch_model.")
    return min(files, key=lambda path: (not path.name.startswith(published),
                                        (".fp16." in path.name) != (dtype.itemsize == 2), len(path.name)))


def read_parts(places: dict[str, Path], dtype: torch.dtype) -> dict[str, Part]:
    """The network of each kind from its file, or from its folder, which may have a file per precision."""
    paths = {kind: pick_file(place, dtype) if place.is_dir() else place for kind, place in places.items()}
    held = {path: recognise(path) for path in dict.fromkeys(paths.values())}  # a single file is read once
    for kind, path in paths.items():
        if kind not in held[path]:
            from .diagnose import lacking
            raise lacking(held[path], kind)
    return {kind: held[path][kind] for kind, path in paths.items()}


def find_part(path: Path, kind: str, dtype: torch.dtype) -> Part:
    return read_parts({kind: path}, dtype)[kind]


# ---- build and check ---------------------------------------------------------------------------------------------

def build(part: Part) -> Any:
    """The network of `part` on the meta device, its sizes from the config.json beside the file (or SD1.5's)."""
    with without_values():
        if part.kind == "ip_adapter":
            return _adapter(part)
        network, sizes = NETWORKS[part.kind]
        path = part.path.parent / "config.json"
        config = read_config(sizes, path)
        if part.kind == "vision" and not path.exists():
            from .known_encoders import encoder_by_width
            config = encoder_by_width(part)
        if part.kind == "text":  # what the file holds counts, not what the config.json says
            config = replace(config, projection_dim=(part.shapes.get("text_projection.weight") or (None,))[0])
        return network(config)


def _adapter(part: Part) -> IPAdapter:
    """An IP-Adapter has no config.json: its sizes are read off its shapes."""
    layers = {key.split(".")[2] for key in part.shapes if key.startswith("image_proj.layers.")}
    try:
        if layers != {str(i) for i in range(len(layers))}:
            raise ValueError("a layer")
        return IPAdapter(part.shapes)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        from .diagnose import unknown_adapter
        raise unknown_adapter(part, error) from None


def _check_fit(networks: dict, parts: dict[str, Part]) -> None:
    """Parts may load one by one and still not fit together; say which does not."""
    unet, text, adapter, vision = (networks.get(kind) for kind in ("unet", "text", "ip_adapter", "vision"))
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
    return tokenizer_of(find_tokenizer(weights), config)


def tokenizer_of(folder: Path, config: CLIPTextConfig) -> Tokenizer:
    """A folder's vocabulary. Raises Problem where the text encoder has another."""
    tokenizer = Tokenizer.from_folder(folder, config.max_tokens)
    if tokenizer.end_id != config.vocab_size - 1:
        raise Problem(f"{folder}: a vocabulary of {tokenizer.end_id + 1} tokens, the text encoder has "
                      f"{config.vocab_size}; they belong to different models")
    return tokenizer
