"""The tiny networks: their config.json, how diffusers and transformers build them, and the adapters' shapes."""

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

logging.set_verbosity_error()  # it warns of casting to float64
ADAPTERS = ("base", "plus", "full-face")
SIZES = {
    "unet": dict(block_out_channels=[8, 12, 16], layers_per_block=1, attention_head_dim=2, cross_attention_dim=12,
                 norm_num_groups=4, sample_size=8,
                 down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                 up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
    "vae": dict(block_out_channels=[8, 12], layers_per_block=1, norm_num_groups=4, latent_channels=4,
                scaling_factor=0.18215, down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2),
    "text": dict(architectures=["CLIPTextModelWithProjection"], vocab_size=40, hidden_size=12, num_hidden_layers=2,
                 num_attention_heads=3, intermediate_size=20, max_position_embeddings=8, projection_dim=6,
                 hidden_act="quick_gelu", layer_norm_eps=1e-5, bos_token_id=38, pad_token_id=39, eos_token_id=2),
    "vision": dict(architectures=["CLIPVisionModelWithProjection"], hidden_size=16, num_hidden_layers=3,
                   num_attention_heads=2, intermediate_size=20, image_size=12, patch_size=4, projection_dim=10,
                   hidden_act="gelu", layer_norm_eps=1e-5),
}
SD15 = dict(block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
# of the cross-attentions in the order of an adapter's numbers: down, up, mid
WIDTHS = (8, 12, 12, 12, 8, 8, 16)


def build(kind):
    """The library's network with its own random weights."""
    sizes = {key: value for key, value in SIZES[kind].items() if key != "architectures"}
    if kind == "unet":
        return UNet2DConditionModel(**sizes)
    if kind == "vae":
        return AutoencoderKL(**sizes)
    if kind == "text":
        return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, attn_implementation="sdpa"))
    # "eager" would take its softmax in float32
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, attn_implementation="sdpa"))


def adapter_shapes(family):
    """The keys and shapes of a published IP-Adapter file, made small."""
    context, wide = SIZES["unet"]["cross_attention_dim"], SIZES["vision"]["hidden_size"]

    def affine(name, n):
        return {f"{name}.weight": (n,), f"{name}.bias": (n,)}

    def linear(name, n_out, n_in):
        return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
    if family == "base":
        shapes = linear("proj", 4 * context, SIZES["vision"]["projection_dim"]) | affine("norm", context)
    elif family == "full-face":
        shapes = linear("proj.0", wide, wide) | linear("proj.2", context, wide) | affine("proj.3", context)
    else:
        dim, inner = 8, 128  # two heads of 64
        shapes = {"latents": (1, 16, dim)} | linear("proj_in", dim, wide) | linear("proj_out", context, dim)
        shapes |= affine("norm_out", context)
        for layer in (f"layers.{i}" for i in range(4)):
            shapes |= affine(f"{layer}.0.norm1", dim) | affine(f"{layer}.0.norm2", dim) | affine(f"{layer}.1.0", dim)
            shapes |= {f"{layer}.0.to_q.weight": (inner, dim), f"{layer}.0.to_kv.weight": (2 * inner, dim),
                       f"{layer}.0.to_out.weight": (dim, inner), f"{layer}.1.1.weight": (4 * dim, dim),
                       f"{layer}.1.3.weight": (dim, 4 * dim)}
    return {f"image_proj.{key}": shape for key, shape in shapes.items()} | {
        f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight": (width, context) for i, width in enumerate(WIDTHS) for x in "kv"}
