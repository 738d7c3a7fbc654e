"""A folder's config.json as sizes of a network, scheduler_config.json as a schedule. Settings that would change the
mathematics are refused, not ignored."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..common.problem import Problem
from ..ddim import Schedule, ScheduleConfig
from ..networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig

AGAIN = "copy the file again from the model's repository"
LARGEST_FILE, LARGEST_SIZE = 2**24, 2**20


class Key(NamedTuple):
    """One key of a config.json: the field that it fills, the values under which our mathematics is the model's, and
    what the library that wrote the file means where the key is absent (None: our own default, which is SD1.5's)."""

    field: str | None = None
    only: tuple = ()
    absent: object = None


def _only(**values: tuple) -> dict[str, Key]:
    """Keys that fill no field."""
    return {key: Key(only=allowed) for key, allowed in values.items()}


ACTS = ("quick_gelu", "gelu")
SWISH = ("silu", "swish")  # two names of one function

# The absent values are the defaults of transformers' CLIPTextConfig and CLIPVisionConfig, which leave out of a file
# what equals them (models/clip/configuration_clip.py), and of all of diffusers' schedulers.
KEYS = {
    UNetConfig: {
        "in_channels": Key("in_channels", only=(4,)),  # inpainting and editing models read 9 and 8
        "out_channels": Key("out_channels", only=(4,)),
        "block_out_channels": Key("channels"),
        "layers_per_block": Key("layers_per_block"),
        "attention_head_dim": Key("n_heads"),  # a historical misnomer: it holds the NUMBER of heads
        "cross_attention_dim": Key("context_dim"),
        "norm_num_groups": Key("norm_groups"),
        "sample_size": Key("sample_size"),
        **_only(act_fn=SWISH, norm_eps=(1e-5,), flip_sin_to_cos=(True,), freq_shift=(0,), center_input_sample=(False,),
                downsample_padding=(1,), mid_block_scale_factor=(1,), mid_block_type=("UNetMidBlock2DCrossAttn",),
                use_linear_projection=(False,), dual_cross_attention=(False,), only_cross_attention=(False,),
                mid_block_only_cross_attention=(None, False), cross_attention_norm=(None,), class_embed_type=(None,),
                addition_embed_type=(None,), encoder_hid_dim=(None,), encoder_hid_dim_type=(None,),
                time_cond_proj_dim=(None,), timestep_post_act=(None,), time_embedding_act_fn=(None,),
                time_embedding_dim=(None,), time_embedding_type=("positional",), num_class_embeds=(None,),
                transformer_layers_per_block=(1,), reverse_transformer_layers_per_block=(None,),
                resnet_time_scale_shift=("default",), resnet_skip_time_act=(False,), resnet_out_scale_factor=(1,),
                conv_in_kernel=(3,), conv_out_kernel=(3,), attention_type=("default",), num_attention_heads=(None,),
                upcast_attention=(False, None, True))},  # where it is computed, not what
    VAEConfig: {
        "in_channels": Key("in_channels", only=(3,)),
        "latent_channels": Key("latent_channels", only=(4,)),
        "block_out_channels": Key("channels"),
        "layers_per_block": Key("layers_per_block"),
        "norm_num_groups": Key("norm_groups"),
        "scaling_factor": Key("scaling_factor"),
        **_only(act_fn=SWISH, use_quant_conv=(True,), use_post_quant_conv=(True,), mid_block_add_attention=(True,),
                shift_factor=(None,), latents_mean=(None,), latents_std=(None,))},
    CLIPTextConfig: {
        "vocab_size": Key("vocab_size", absent=49408),
        "hidden_size": Key("width", absent=512),
        "num_hidden_layers": Key("layers", absent=12),
        "num_attention_heads": Key("n_heads", absent=8),
        "intermediate_size": Key("mlp_width", absent=2048),
        "max_position_embeddings": Key("max_tokens", absent=77),
        "hidden_act": Key("act", only=ACTS, absent="quick_gelu"),
        "layer_norm_eps": Key("eps", absent=1e-5)},
    CLIPVisionConfig: {
        "hidden_size": Key("width", absent=768),
        "num_hidden_layers": Key("layers", absent=12),
        "num_attention_heads": Key("n_heads", absent=12),
        "intermediate_size": Key("mlp_width", absent=3072),
        "image_size": Key("image_size", absent=224),
        "patch_size": Key("patch_size", absent=32),
        "projection_dim": Key("projection_dim", absent=512),
        "hidden_act": Key("act", only=ACTS, absent="quick_gelu"),
        "layer_norm_eps": Key("eps", absent=1e-5),
        "num_channels": Key(only=(3,))},
    ScheduleConfig: {
        "num_train_timesteps": Key("train_steps", absent=1000),
        "beta_start": Key("beta_start", absent=0.0001),
        "beta_end": Key("beta_end", absent=0.02),
        "beta_schedule": Key("beta_schedule", only=("scaled_linear", "linear"), absent="linear"),
        "steps_offset": Key("steps_offset", only=(0, 1)),
        "set_alpha_to_one": Key("alpha_to_one"),
        **_only(prediction_type=("epsilon",), trained_betas=(None,), rescale_betas_zero_snr=(False,),
                timestep_spacing=("leading",), thresholding=(False,))},
}
PER_LEVEL = {"attention_head_dim", "only_cross_attention", "layers_per_block", "cross_attention_dim",
             "transformer_layers_per_block"}  # a list of equal values is that value


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises Problem for anything else, however long or deep."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is longer than {LARGEST_FILE >> 20} MB")
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}, not an object")
        return raw
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); check the file") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Problem(f"{path}: not a readable config ({str(error)[:100]}); copy it again from the model's "
                      "repository") from None


def read_config(cls, path: str | Path):
    """The dataclass `cls` from a diffusers / transformers config.json; the defaults where there is no such file.

    Raises Problem for unreadable JSON and for a setting that isadca does not compute. `steps_offset` is 1, whatever
    the file says, as StableDiffusionPipeline has it.
    """
    path = Path(path)
    if not path.is_file():
        return cls()
    raw = read_json(path)
    half = {CLIPTextConfig: "text_config", CLIPVisionConfig: "vision_config"}.get(cls)
    if isinstance(raw.get(half), dict):  # a whole CLIP, with both halves in one file
        raw = raw[half] | {"projection_dim": raw.get("projection_dim", 512),
                           "architectures": ["CLIPTextModelWithProjection"]}
    values = {}
    for name, key in KEYS[cls].items():
        value = raw.get(name, key.absent)
        if name in PER_LEVEL and isinstance(value, list) and value and value == value[:1] * len(value):
            value = value[0]
        if name in raw and key.only and value not in key.only:
            raise Problem(f"{path}: {name} is {_short(value)}, isadca computes {' or '.join(map(repr, key.only))} "
                          "only; use a plain Stable Diffusion 1.x model")
        if key.field and (name in raw or key.absent is not None):
            values[key.field] = tuple(value) if isinstance(value, list) else value
    if cls is UNetConfig:
        values |= _unet_levels(raw, path)
    if cls is CLIPTextConfig and "CLIPTextModelWithProjection" in str(raw.get("architectures")):
        values["projection_dim"] = raw.get("projection_dim", 512)
    config = _checked(cls, values, path)
    return replace(config, steps_offset=1) if cls is ScheduleConfig else config


def read_schedule(path: Path) -> Schedule:
    """The noise levels of a scheduler_config.json. Raises Problem where they do not fall from 1 towards 0."""
    config = read_config(ScheduleConfig, path)
    schedule = Schedule(config)
    levels = [schedule.alpha_bar(t) for t in range(config.train_steps)]
    if not (1 > levels[0] and levels == sorted(levels, reverse=True) and levels[-1] > 0):
        raise Problem(f"{path}: beta_start {config.beta_start} and beta_end {config.beta_end} make no falling noise "
                      f"levels; {AGAIN}")
    return schedule


def check_prediction(path: Path, keys) -> None:
    """A single file says in a key (ComfyUI's) or in a .yaml beside it that it predicts v instead of the noise."""
    beside = [path.with_suffix(suffix) for suffix in (".yaml", ".yml")]
    says = re.compile(r"""^\s*parameterization\s*:\s*['"]?v['"]?\s*(#.*)?$""", re.MULTILINE)
    signs = [f"the key {key}" for key in ("v_pred", "ztsnr") if key in keys]
    signs += [str(yaml) for yaml in beside if yaml.is_file() and yaml.stat().st_size < LARGEST_FILE
              and says.search(yaml.read_text(encoding="utf-8", errors="replace"))]
    if signs:
        raise Problem(f"{path}: predicts v, by {signs[0]}; isadca computes epsilon only; use a plain Stable Diffusion "
                      "1.x model")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def _unet_levels(raw: dict, path: Path) -> dict:
    """Which levels attend, from the block type names; the way up must mirror the way down."""
    down, up = raw.get("down_block_types"), raw.get("up_block_types")
    if down is None:
        return {}
    names = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
    attention, mirrored = (tuple(names.get(str(n)) for n in types) if isinstance(types, list) else (None,)
                           for types in (down, up))
    if None in attention or attention != mirrored[::-1]:
        raise Problem(f"{path}: block types {_short(down)} and {_short(up)} are not those of Stable Diffusion 1.x; use "
                      "a plain one")
    return {"attention": attention}


def _checked(cls, values: dict, path: Path):
    """Build `cls`, turning a wrong type or size into one line that names the file and the field."""
    default = cls()
    for field, value in values.items():
        usual = 1 if field == "projection_dim" else getattr(default, field)
        if not _fits(value, usual, least=0 if field == "steps_offset" else 1):
            raise Problem(f"{path}: {field} is {_short(value)}, expected a {type(usual).__name__} such as {usual!r}; "
                          f"{AGAIN}")
    config = cls(**values)
    widths = getattr(config, "channels", (getattr(config, "width", 0),))
    for field in ("n_heads", "norm_groups"):
        if any(width % getattr(config, field, 1) for width in widths):
            raise Problem(f"{path}: {field} is {getattr(config, field)}, which does not divide {_short(widths)}; "
                          f"{AGAIN}")
    if len(getattr(config, "attention", widths)) != len(widths):
        raise Problem(f"{path}: {len(widths)} channels for {len(config.attention)} block types; {AGAIN}")
    return config


def _fits(value, usual, least: int) -> bool:
    """Whether a value has the type of the usual one, and its numbers a size that can be built."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and len(value) > 0 and all(_fits(v, usual[0], least) for v in value)
    if isinstance(usual, float):
        return type(value) in (int, float) and 0 < value < LARGEST_SIZE
    return type(value) is type(usual) and (type(value) is not int or least <= value <= LARGEST_SIZE)
