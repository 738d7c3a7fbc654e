"""The layouts whose names are not ours: the original (LDM) single files, and older diffusers and transformers.
Imported only where such a file is met.

Rules are applied in order: the first ones place a block, the later ones rename what is inside it. Sources:
CompVis/stable-diffusion, diffusers, transformers.
"""

import re
from collections.abc import Callable

from ..common.problem import Problem
from .layouts import Header, Layout


def _block(place: str, first: int) -> Callable[[re.Match], str]:
    """The N of input_blocks.N and output_blocks.N counts three entries a level, from `first` on. In `place`, {0} is
    the level and {1} the entry."""
    return lambda match: place.format(*divmod(int(match[1]) - first, 3))


UNET_RULES = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^input_blocks\.(\d+)\.0\.op\.", _block("down_blocks.{0}.downsamplers.0.conv.", 1)),
    (r"^input_blocks\.(\d+)\.0\.", _block("down_blocks.{0}.resnets.{1}.", 1)),
    (r"^input_blocks\.(\d+)\.1\.", _block("down_blocks.{0}.attentions.{1}.", 1)),
    (r"^output_blocks\.(\d+)\.\d\.conv\.", _block("up_blocks.{0}.upsamplers.0.conv.", 0)),
    (r"^output_blocks\.(\d+)\.0\.", _block("up_blocks.{0}.resnets.{1}.", 0)),
    (r"^output_blocks\.(\d+)\.1\.", _block("up_blocks.{0}.attentions.{1}.", 0)),
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
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.(group_norm|to_[qkv]|to_out\.0)\.", r".mid_block.attentions.0.\1."),  # converted halfway
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
# what the metadata of single files say in lower case where they predict the noise
METADATA = {"modelspec.prediction_type": ("epsilon", "eps"), "ss_v_parameterization": ("false", "none"),
            "ss_zero_terminal_snr": ("false", "none")}
LDM_FILE, IN_FILE = "LDM single file", "cond_stage_model.transformer."
ORIGINAL = [
    Layout("unet", LDM_FILE, "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.", UNET_RULES),
    Layout("vae", LDM_FILE, "first_stage_model.encoder.conv_in.weight", "first_stage_model.", VAE_RULES),
    Layout("vae", "LDM", "vae.encoder.conv_in.weight", "vae.", VAE_RULES),
    Layout("text", LDM_FILE, f"{IN_FILE}text_model.final_layer_norm.weight", IN_FILE),
    Layout("text", f"{LDM_FILE}, old names", f"{IN_FILE}final_layer_norm.weight", IN_FILE, TEXT_RULES),
    Layout("unet", "LDM", "input_blocks.0.0.weight", "", UNET_RULES),
    Layout("vae", "LDM", "encoder.down.0.block.0.norm1.weight", "", VAE_RULES),
    Layout("vae", "diffusers, old attention names", "encoder.mid_block.attentions.0.query.weight", "", VAE_RULES),
    Layout("text", "transformers, without text_model.", "embeddings.token_embedding.weight", "", TEXT_RULES),
]


def check_prediction(header: Header) -> None:
    """Raises Problem for a single file that predicts v instead of the noise. A key (ComfyUI's), its metadata
    (ModelSpec's, sd-scripts') or a .yaml beside it says so."""
    signs = [f"the key {key}" for key in ("v_pred", "ztsnr") if key in header.tensors]
    signs += [f"the metadata {key}: {header.metadata[key]}" for key, plain in METADATA.items()
              if header.metadata.get(key, plain[0]).lower() not in plain]
    says = re.compile(r"""^\s*parameterization\s*:\s*['"]?v['"]?\s*(#.*)?$""", re.MULTILINE)
    beside = [header.path.with_suffix(suffix) for suffix in (".yaml", ".yml")]
    signs += [str(yaml) for yaml in beside if yaml.is_file() and yaml.stat().st_size < 2**24
              and says.search(yaml.read_text(encoding="utf-8", errors="replace"))]
    if signs:
        raise Problem(f"{header.path}: predicts v, by {signs[0]}; isadca computes epsilon only; use a plain "
                      "Stable Diffusion 1.x model")
