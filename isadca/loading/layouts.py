"""How the published files name their tensors, and the rules that give these our names, which are diffusers'.

The rules for single files in the original (LDM) layout are ordered: the first place a block, the last rename what is
inside it. Layouts: CompVis/stable-diffusion, diffusers, transformers, h94/IP-Adapter.
"""

import re
from collections.abc import Callable
from typing import NamedTuple


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
IGNORED = r"position_ids$|^loss\.|^model_ema\.|^lora_(unet|te)"  # rebuilt, for training, or merged already

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


def rename(key: str, rules: list) -> str:
    """One key through an ordered rule table."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
