"""isadca's networks, preprocessing, tokenizer and metrics under the names and on the arrays of the vectors."""

from functools import lru_cache
from unittest import mock

import numpy as np
import torch
from PIL import Image

from cases import HERE
from isadca import attention as kernels
from isadca.common import images
from isadca.evaluation import metrics
from isadca.loading.checkpoints import load_into
from isadca.loading.load import build, find_part
from isadca.networks import unet as unet_module
from isadca.networks.ip_adapter import IPAdapter, numbered
from isadca.networks.sizes import UNetConfig
from isadca.networks.tokenizer import Tokenizer

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]


# ---- networks, from the files as the package loads them --------------------------------------------------------

@lru_cache
def network(kind):
    part = find_part(HERE / "model" / FOLDERS[kind], kind, torch.float64)
    return load_into(build(part), part, torch.float64)


def adapter_of(weights):
    """The adapter with these weights, in the package's module."""
    module = IPAdapter({name: x.shape for name, x in weights.items()})
    module.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, assign=True)
    return module.requires_grad_(False)


def exact_embedding(t, dim):
    half = dim // 2
    angles = t.double()[:, None] * torch.exp(-np.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


exact_time = mock.patch.object(unet_module, "timestep_embedding", exact_embedding)


@exact_time
def unet(weights, config, z, t, context):
    return network("unet")(*tensors(z, t, context))


@exact_time
def unet_with_image(weights, config, adapter, z, t, context, tokens, scale):
    kv = image_pairs(adapter, tokens)
    return network("unet")(*tensors(z, t, context), kernels.dca(kv, scale))


def vae_encode(weights, config, pixels):
    return network("vae").encode(torch.from_numpy(pixels))


def vae_decode(weights, config, z):
    return network("vae").decode(torch.from_numpy(z))


def clip_text(weights, config, ids):
    return network("text")(torch.from_numpy(ids))


def clip_text_embed(weights, config, ids):
    return network("text").embed(torch.from_numpy(ids))


def clip_image(weights, config, pixels):
    embeds, states = network("vision")(torch.from_numpy(pixels))
    return {"embeds": embeds, "states": states}


def image_tokens(weights, features, nothing):
    return adapter_of(weights).tokens(*tensors(features, nothing))


def image_pairs(weights, tokens):
    module = network("unet")
    return adapter_of(weights).keys_values(torch.from_numpy(tokens), module.sites, module.config.n_heads)


def image_keys_values(weights, config, tokens):
    return {f"{name}.{x}": y for name, pair in image_pairs(weights, tokens).items() for x, y in zip("kv", pair)}


def adapter_order(config):
    sizes = UNetConfig(channels=tuple(config["block_out_channels"]), layers_per_block=config["layers_per_block"],
                       attention=tuple(kind.startswith("Cross") for kind in config["down_block_types"]),
                       norm_groups=config.get("norm_num_groups", 32))
    with torch.device("meta"):
        module = unet_module.UNet(sizes)
    return np.array([site.layer for site in numbered(module.sites).values()])


# ---- pictures and text -----------------------------------------------------------------------------------------

def vae_pixels(image, size, how):
    return images.to_tensor(images.fit(Image.fromarray(image), (size, size), how))


def clip_pixels(image, size):
    return images.clip_pixels(Image.fromarray(image), size)


def tokenize(texts, vocab, merges):
    return Tokenizer.from_folder(HERE.parent.parent / "weights" / "tokenizer", 77)(texts)


def ssim(a, b):
    return metrics.ssim(*tensors(a, b))


def lpips(a, b, kind, trunk, heads):
    trunk, heads = ({name: torch.from_numpy(x) for name, x in w.items()} for w in (trunk, heads))
    return metrics.lpips(*tensors(a, b), kind, trunk, heads)


def sifid(a, b, inception):
    return metrics.sifid(*tensors(a, b), {name: torch.from_numpy(x) for name, x in inception.items()})
