"""A folder's config.json as sizes of a network or as a schedule. Settings that would change the mathematics are
refused, not ignored."""

import json
from pathlib import Path

from ..common.problem import Problem
from ..ddim import ScheduleConfig
from ..networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig

# config.json key -> field here. `attention_head_dim` is a historical misnomer: it holds the NUMBER of heads.
_NAMES = {
    UNetConfig: dict(in_channels="in_channels", out_channels="out_channels", block_out_channels="channels",
                     layers_per_block="layers_per_block", attention_head_dim="n_heads",
                     cross_attention_dim="context_dim", norm_num_groups="norm_groups", sample_size="sample_size"),
    VAEConfig: dict(in_channels="in_channels", latent_channels="latent_channels", block_out_channels="channels",
                    layers_per_block="layers_per_block", norm_num_groups="norm_groups",
                    scaling_factor="scaling_factor"),
    CLIPTextConfig: dict(vocab_size="vocab_size", hidden_size="width", num_hidden_layers="layers",
                         num_attention_heads="n_heads", intermediate_size="mlp_width",
                         max_position_embeddings="max_tokens", hidden_act="act", layer_norm_eps="eps"),
    CLIPVisionConfig: dict(hidden_size="width", num_hidden_layers="layers", num_attention_heads="n_heads",
                           intermediate_size="mlp_width", image_size="image_size", patch_size="patch_size",
                           projection_dim="projection_dim", hidden_act="act", layer_norm_eps="eps"),
    ScheduleConfig: dict(num_train_timesteps="train_steps", beta_start="beta_start", beta_end="beta_end",
                         beta_schedule="beta_schedule", steps_offset="steps_offset",
                         set_alpha_to_one="alpha_to_one"),
}

# config.json key -> the values under which our mathematics is the model's. A missing key has the first of them.
_FIXED = {
    UNetConfig: dict(act_fn=("silu",), norm_eps=(1e-5,), flip_sin_to_cos=(True,), freq_shift=(0,),
                     center_input_sample=(False,), downsample_padding=(1,), mid_block_scale_factor=(1,),
                     use_linear_projection=(False,), dual_cross_attention=(False,), only_cross_attention=(False,),
                     class_embed_type=(None,), addition_embed_type=(None,), encoder_hid_dim=(None,),
                     time_cond_proj_dim=(None,), transformer_layers_per_block=(1,), num_class_embeds=(None,),
                     resnet_time_scale_shift=("default",), time_embedding_type=("positional",),
                     attention_type=("default",), num_attention_heads=(None,), upcast_attention=(False, None),
                     in_channels=(4,), out_channels=(4,)),  # inpainting and editing models read 9 and 8
    VAEConfig: dict(act_fn=("silu",), in_channels=(3,), latent_channels=(4,), use_quant_conv=(True,),
                    use_post_quant_conv=(True,), mid_block_add_attention=(True,), shift_factor=(None,),
                    latents_mean=(None,), latents_std=(None,)),
    CLIPTextConfig: dict(hidden_act=("quick_gelu", "gelu")),
    CLIPVisionConfig: dict(hidden_act=("quick_gelu", "gelu"), num_channels=(3,)),
    ScheduleConfig: dict(prediction_type=("epsilon",), trained_betas=(None,), rescale_betas_zero_snr=(False,),
                         beta_schedule=("scaled_linear", "linear"), steps_offset=(0, 1)),
}


def read_config(cls, path: str | Path):
    """The dataclass `cls` from a diffusers / transformers config.json; the defaults where there is no such file.

    Raises Problem for unreadable JSON and for a setting that isadca does not compute.
    """
    path = Path(path)
    if not path.is_file():
        return cls()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}, not an object")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Problem(f"{path}: not a readable config ({error}); copy it again from the model's repository") from None
    half = {CLIPTextConfig: "text_config", CLIPVisionConfig: "vision_config"}.get(cls)
    if isinstance(raw.get(half), dict):  # a whole CLIP, with both halves in one file
        raw = raw[half] | {"projection_dim": raw.get("projection_dim", 512),
                           "architectures": ["CLIPTextModelWithProjection"]}
    for key, allowed in _FIXED[cls].items():
        if key in raw and raw[key] not in allowed:
            raise Problem(f"{path}: {key} is {raw[key]!r}, isadca computes {' or '.join(map(repr, allowed))} only; "
                          "use a plain Stable Diffusion 1.x model")
    values = {field: raw[key] for key, field in _NAMES[cls].items() if key in raw}
    if cls is UNetConfig:
        values |= _unet_levels(raw, path)
    if cls is CLIPTextConfig and "CLIPTextModelWithProjection" in str(raw.get("architectures")):
        values["projection_dim"] = raw.get("projection_dim", 512)
    return _checked(cls, {field: tuple(v) if isinstance(v, list) else v for field, v in values.items()}, path)


def _unet_levels(raw: dict, path: Path) -> dict:
    """Which levels attend, from the block type names; the way up must mirror the way down."""
    down, up = raw.get("down_block_types"), raw.get("up_block_types")
    if down is None:
        return {}
    names = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
    attention, mirrored = ([names.get(str(n)) for n in types] if isinstance(types, list) else [None]
                           for types in (down, up))
    if None in attention or attention != mirrored[::-1]:
        raise Problem(f"{path}: block types {down} and {up} are not those of Stable Diffusion 1.x; use a plain one")
    return {"attention": attention}


def _checked(cls, values: dict, path: Path):
    """Build `cls`, turning a wrong type or size into one line that names the file and the field."""
    default, again = cls(), "copy the file again from the model's repository"
    for field, value in values.items():
        usual = 1 if field == "projection_dim" else getattr(default, field)
        if not _fits(value, usual, least=0 if field == "steps_offset" else 1):
            raise Problem(f"{path}: {field} is {value!r}, expected a {type(usual).__name__} such as {usual!r}; {again}")
    config = cls(**values)
    widths = getattr(config, "channels", (getattr(config, "width", 0),))
    for field in ("n_heads", "norm_groups"):
        if any(width % getattr(config, field, 1) for width in widths):
            raise Problem(f"{path}: {field} is {getattr(config, field)}, which does not divide {widths}; {again}")
    if len(getattr(config, "attention", widths)) != len(widths):
        raise Problem(f"{path}: {len(widths)} channels for {len(config.attention)} block types; {again}")
    return config


def _fits(value, usual, least: int) -> bool:
    """Whether a value has the type of the usual one, and its numbers a size that can be built."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and len(value) > 0 and all(_fits(v, usual[0], least) for v in value)
    if isinstance(usual, float):
        return type(value) in (int, float) and 0 < value < float("inf")
    return type(value) is type(usual) and (type(value) is not int or value >= least)
