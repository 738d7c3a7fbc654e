"""Sizes of the networks as frozen dataclasses. The defaults are Stable Diffusion 1.5."""

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)         # one per level, finest first
    attention: tuple[bool, ...] = (True, True, True, False)    # which levels have transformer blocks
    layers_per_block: int = 2
    n_heads: int = 8                                           # in every level: head dims 40, 80, 160
    context_dim: int = 768
    norm_groups: int = 32
    sample_size: int = 64                                      # side of the latent the model was trained on


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class CLIPTextConfig:
    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    n_heads: int = 12
    mlp_width: int = 3072
    max_tokens: int = 77
    act: str = "quick_gelu"
    eps: float = 1e-5
    projection_dim: int | None = None                          # None: the file has no text_projection


@dataclass(frozen=True)
class CLIPVisionConfig:                                        # defaults: OpenCLIP ViT-H/14, IP-Adapter's encoder
    width: int = 1280
    layers: int = 32
    n_heads: int = 16
    mlp_width: int = 5120
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    act: str = "gelu"
    eps: float = 1e-5
