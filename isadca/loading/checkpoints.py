"""Published weight files: open, recognise the layout, rename, load strictly - or say in one line what is wrong.

Our names are diffusers' names. Single files in the original (LDM) layout go through the rules below, which are
ordered: the first rules place a block, the last rename what is inside it. Only safetensors is read.
Layouts: CompVis/stable-diffusion, diffusers, transformers, h94/IP-Adapter.
"""

import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..common.problem import Problem


def _input_block(kind: str) -> Callable[[re.Match], str]:
    """input_blocks.N: three entries a level (two layers and a downsample), after conv_in."""
    def place(match):
        level, layer = divmod(int(match[1]) - 1, 3)
        return f"down_blocks.{level}.{kind.format(layer)}."
    return place


def _output_block(kind: str) -> Callable[[re.Match], str]:
    def place(match):
        level, layer = divmod(int(match[1]), 3)
        return f"up_blocks.{level}.{kind.format(layer)}."
    return place


UNET_RULES = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^input_blocks\.(\d+)\.0\.op\.", _input_block("downsamplers.0.conv")),
    (r"^input_blocks\.(\d+)\.0\.", _input_block("resnets.{}")),
    (r"^input_blocks\.(\d+)\.1\.", _input_block("attentions.{}")),
    (r"^output_blocks\.(\d+)\.\d\.conv\.", _output_block("upsamplers.0.conv")),
    (r"^output_blocks\.(\d+)\.0\.", _output_block("resnets.{}")),
    (r"^output_blocks\.(\d+)\.1\.", _output_block("attentions.{}")),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]
VAE_RULES = [
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.down\.(\d)\.block\.(\d)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.(\d)\.", lambda m: f".up_blocks.{3 - int(m[1])}.resnets.{m[2]}."),  # numbered from 64² up
    (r"\.up\.(\d)\.upsample\.", lambda m: f".up_blocks.{3 - int(m[1])}.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    # diffusers before 0.15 (SD1.5's fp32 VAE file)
    (r"\.attentions\.0\.(query|key|value)\.", lambda m: f".attentions.0.to_{m[1][0]}."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
]
TEXT_RULES = [(r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1.")]  # files that lack the prefix
FLOATS = ("F16", "BF16", "F32", "F64")
IGNORED = r"position_ids$|^loss\.|^model_ema\."  # rebuilt, or training's

CLIP_HALVES = {"vision": r"^(vision_model|visual_projection)\.",  # a file may hold both halves of a CLIP
               "text": r"^(text_model|text_projection|embeddings|encoder|final_layer_norm)\."}


class Layout(NamedTuple):
    """How one part is stored in one kind of file: `mark` is a key that only this layout has."""

    part: str
    name: str
    mark: str
    prefix: str = ""
    rules: list = []


LAYOUTS = [
    Layout("unet", "LDM single file", "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.",
           UNET_RULES),
    Layout("vae", "LDM single file", "first_stage_model.encoder.conv_in.weight", "first_stage_model.", VAE_RULES),
    Layout("vae", "LDM", "vae.encoder.conv_in.weight", "vae.", VAE_RULES),
    Layout("text", "LDM single file", "cond_stage_model.transformer.text_model.final_layer_norm.weight",
           "cond_stage_model.transformer."),
    Layout("text", "LDM single file, old names", "cond_stage_model.transformer.final_layer_norm.weight",
           "cond_stage_model.transformer.", TEXT_RULES),
    Layout("unet", "diffusers", "down_blocks.0.resnets.0.time_emb_proj.weight"),
    Layout("unet", "LDM", "input_blocks.0.0.weight", "", UNET_RULES),
    Layout("vae", "LDM", "encoder.down.0.block.0.norm1.weight", "", VAE_RULES),
    Layout("vae", "diffusers, old attention names", "encoder.mid_block.attentions.0.query.weight", "", VAE_RULES),
    Layout("vae", "diffusers", "encoder.mid_block.attentions.0.to_q.weight"),
    Layout("text", "transformers", "text_model.final_layer_norm.weight"),
    Layout("text", "transformers, without text_model.", "embeddings.token_embedding.weight", "", TEXT_RULES),
    Layout("vision", "transformers", "vision_model.embeddings.class_embedding"),
    Layout("ip_adapter", "h94", "ip_adapter.1.to_k_ip.weight"),
]

# what people try that is not loadable: (a key that tells, what it is, what to do)
STRANGERS = [
    (r"^lora_|\.lora[._]|^(unet|text_encoder)\..*_lora\.", "a LoRA", "merge it into a checkpoint first"),
    (r"^conditioner\.embedders\.|^add_embedding\.", "an SDXL model", "isadca implements Stable Diffusion 1.x"),
    (r"^cond_stage_model\.model\.transformer\.resblocks\.", "an SD 2.x model",
     "isadca implements Stable Diffusion 1.x"),
    (r"^controlnet_|^input_hint_block\.", "a ControlNet", "give the base model with --weights"),
]
UNKNOWN = [  # the same, for files in which no part was recognised
    (r"^control_model\.", "a ControlNet", "give the base model with --weights"),
    (r"^adapter_modules\.|^image_proj_model\.", "an IP-Adapter training checkpoint",
     "convert it to the published layout: isadca convert FILE -o NAME.safetensors"),
]


@dataclass(frozen=True)
class Part:
    """One network's tensors in one file. `names` maps our key to the file's."""

    kind: str
    path: Path
    layout: str
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]  # by our key
    dtypes: dict[str, str]


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> (shape, dtype) of a safetensors file, without reading the data. Raises Problem if it is not one."""
    if not path.exists():
        raise Problem(f"{path}: no such file; check the path, and that the model is complete")
    if path.is_dir():
        raise Problem(f"{path}: is a folder, expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (OSError, RuntimeError) as error:  # no permission; no memory to map it into
        reason = getattr(error, "strerror", None) or error
        raise Problem(f"{path}: cannot be read ({reason}); check the file, or free memory") from None
    except (SafetensorError, ValueError) as error:
        raise Problem(f"{path}: {_not_safetensors(path)} ({error})") from None


def _not_safetensors(path: Path) -> str:
    """What a file is that the safetensors library refused, from its first bytes."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"PK", b"\x80\x02"):
        return ("is a pickle, which can run code when it is opened; get the .safetensors version, or make it: "
                f"isadca convert {path} -o NAME.safetensors")
    if start == b"GGUF":
        return "is a GGUF file; get the .safetensors version"
    if start == b"vers":
        return "is a Git LFS pointer, not the file itself; run git lfs pull"
    if not start:
        return "is empty; download it again"
    return "is not a whole safetensors file; download it again"


def recognise(path: str | Path) -> list[Part]:
    """The parts that a safetensors file holds. Raises Problem for files that hold none."""
    path = Path(path)
    header = read_header(path)
    parts: dict[str, Part] = {}
    for layout in LAYOUTS:
        if layout.mark in header and layout.part not in parts:
            parts[layout.part] = _part(path, layout, header)
    for pattern, what, remedy in STRANGERS if parts else STRANGERS + UNKNOWN:
        if any(re.search(pattern, key) for key in header):
            raise Problem(f"{path}: is {what}; {remedy}")
    if not parts:
        example = next(iter(sorted(header)), "no tensors at all")
        raise Problem(f"{path}: none of the layouts that isadca knows (it holds {len(header)} tensors, "
                      f"e.g. {example}); see the README for where to get the files")
    return list(parts.values())


def _part(path: Path, layout: Layout, header: dict) -> Part:
    others = tuple(o.prefix for o in LAYOUTS if o.prefix and o.prefix != layout.prefix)
    names = {}
    for key in header:
        ours = key.removeprefix(layout.prefix)
        elsewhere = key.startswith(others) if not layout.prefix else ours == key
        if not elsewhere and not re.search(IGNORED, ours) and re.search(CLIP_HALVES.get(layout.part, ""), ours):
            names[rename(ours, layout.rules)] = key
    return Part(layout.part, path, layout.name, names, {ours: header[key][0] for ours, key in names.items()},
                {ours: header[key][1] for ours, key in names.items()})


def rename(key: str, rules: list) -> str:
    """One key through an ordered rule table."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


class _NoValues(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        fills = getattr(function, "__module__", None) == "torch.nn.init"
        return kwargs["tensor"] if fills else function(*args, **kwargs or {})


@contextmanager
def without_values():
    """Networks that are built within have shapes but no values: weights are loaded into them.

    The meta device alone would do. But torch imports its compiler to "draw" a meta tensor's initial values: 800
    modules, 1.4 s of a cold start.
    """
    with torch.device("meta"), _NoValues():
        yield


def load_into(model: nn.Module, part: Part, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """Give a model built on the meta device the tensors of `part`; every name and shape must fit.

    fp32 on CPU stays memory-mapped: nothing is copied. Returns the model in eval mode, without gradients on its
    weights (gradients still flow through it).
    """
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    explain_mismatch(expected, part)
    with safe_open(part.path, framework="pt") as file:
        state = {ours: _fit(file.get_tensor(theirs), expected[ours], dtype, device)
                 for ours, theirs in part.names.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _fit(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device) -> Tensor:
    return tensor.reshape(shape).to(device=device, dtype=dtype)


def explain_mismatch(expected: dict[str, tuple[int, ...]], part: Part) -> None:
    """Raise ONE Problem that lists missing, unexpected and misshapen tensors and guesses the cause."""
    for key, dtype in part.dtypes.items():
        if dtype not in FLOATS:  # fp8, int8: their scales are elsewhere, or lost
            raise Problem(f"{part.path}: {_with_origin(key, part)} is {dtype}, expected {', '.join(FLOATS)}; get the "
                          "fp16 version")
    missing = sorted(expected.keys() - part.shapes.keys())
    unexpected = sorted(part.shapes.keys() - expected.keys())
    misshapen = sorted(key for key in expected.keys() & part.shapes.keys()
                       if not _same_shape(part.shapes[key], expected[key]))
    if not (missing or unexpected or misshapen):
        return
    details = [f"{len(keys)} {word}: {', '.join(describe(k) for k in keys[:3])}{', ...' if len(keys) > 3 else ''}"
               for word, keys, describe in [
                   ("missing", missing, lambda k: _with_origin(k, part)),
                   ("unexpected", unexpected, lambda k: _with_origin(k, part)),
                   ("misshapen", misshapen, lambda k: f"{_with_origin(k, part)} is {list(part.shapes[k])}, "
                                                      f"expected {list(expected[k])}")] if keys]
    raise Problem(f"{part.path}: {part.kind} (layout: {part.layout}) does not fit: {'; '.join(details)}. "
                  f"{_guess(part)}")


def _same_shape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    return theirs == ours or theirs == ours + (1, 1)  # LDM keeps the VAE's linear layers as 1×1 convolutions


def _with_origin(key: str, part: Part) -> str:
    theirs = part.names.get(key, key)
    return key if theirs == key else f"{key} (from {theirs})"


def _guess(part: Part) -> str:
    """The usual reasons, told by two shapes."""
    inputs = part.shapes.get("conv_in.weight", ())[1:2]
    context = part.shapes.get("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", ())[1:2]
    if part.kind == "unet" and inputs not in ((), (4,)):
        return f"Its UNet has {inputs[0]} input channels: an inpainting or editing model; get the plain SD 1.x one."
    if part.kind == "unet" and context in ((1024,), (2048,)):
        family = "2.x" if context[0] == 1024 else "XL"
        return f"Its context is {context[0]} wide, SD 1.x has 768: this is an SD {family} model."
    return "Is it complete, and does the config.json beside it belong to it?"
