"""isadca under the names and on the arrays of the vectors. Every function calls the package and nothing else.

One thing is exchanged: the package computes the sinusoids of the time step in float32, as in training, which would
bound what can be compared to 1e-5. Inside the UNet they are in float64 here; the package's own have their vectors.
"""

from functools import lru_cache
from unittest import mock

import numpy as np
import torch
from PIL import Image

from cases import HERE
from isadca import attention as kernels, ddim, images, methods, metrics, variation
from isadca import layers, unet as unet_module
from isadca.checkpoints import load_into
from isadca.config import ScheduleConfig
from isadca.ip_adapter import IPAdapter, numbered
from isadca.loading import build, find_part
from isadca.model import Model
from isadca.reference import Reference, invert as invert_picture
from isadca.tokenizer import Tokenizer

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}
HERE_SELF = kernels.Site("here", "self", "mid", 0)
HERE_CROSS = kernels.Site("here", "cross", "mid", 0)


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]


# ---- equations -------------------------------------------------------------------------------------------------

def attention(q, k, v, causal=False):
    return kernels.attend_reference(*tensors(q, k, v), causal=causal)


def isa(q, k, v, k_ref, v_ref, mode):
    q, k, v, *ref = tensors(q, k, v, k_ref, v_ref)
    return kernels.isa({"here": ref}, mode)(q, k, v, HERE_SELF)


def layer(heads, context, w_q, w_k, w_v):
    """The package's attention layer with these matrices, and none behind it."""
    module = layers.Attention(w_q.shape[1], heads, context).double().requires_grad_(False)
    for name, w in (("to_q", w_q), ("to_k", w_k), ("to_v", w_v)):
        getattr(module, name).weight.data = torch.from_numpy(w)
    module.to_out[0].weight.data = torch.eye(len(w_q), dtype=torch.float64)
    module.to_out[0].bias.data.zero_()
    return module


def isa_layer(x, x_ref, w_q, w_k, w_v, heads):
    module, kv = layer(heads, None, w_q, w_k, w_v), {}
    module.site = HERE_SELF
    x, x_ref = tensors(x, x_ref)
    module(x_ref, x_ref, kernels.capture(kv), (1, 1))
    return module(x, x, kernels.isa(kv), (1, 1))


def dca(q, k, v, k_ip, v_ip, scale):
    q, k, v, *image = tensors(q, k, v, k_ip, v_ip)
    return kernels.dca({"here": image}, scale)(q, k, v, HERE_CROSS)


def dca_layer(x, text, image, w_q, w_k, w_v, w_k_ip, w_v_ip, heads):
    module = layer(heads, text.shape[2], w_q, w_k, w_v)
    module.site = HERE_CROSS
    x, text, image, w_k_ip, w_v_ip = tensors(x, text, image, w_k_ip, w_v_ip)
    kv = [layers.split_heads(image @ w.T, heads) for w in (w_k_ip, w_v_ip)]
    return module(x, text, kernels.dca({"here": kv}), (1, 1))


def mix_noise(eps_isa, eps_dca, lam):
    """The package mixes inside `predict`, so that is called, with a model whose two branches give these."""
    given = torch.cat(tensors(eps_isa, eps_dca))

    class Both:
        schedule = ddim.Schedule()

        def noise(self, z, t, context, attend):
            return given if lam not in (0, 1) else tensors(eps_isa, eps_dca)[0 if lam == 1 else 1]
    told = variation.Conditions(torch.zeros(1, 1, 1), {})
    method = methods.Method(lam=lam, guidance=1.0)
    return variation.predict(Both(), torch.zeros(*eps_isa.shape), 500, told, None, method, kernels.attend).mixed


def controls(lam, method, ref_kv=None, ip_kv=None):
    return variation.Controls(500, lam, ref_kv or {}, ip_kv or {}, method, kernels.attend)


def mix_self(q, k, v, k_ref, v_ref, lam, mode):
    q, k, v, *ref = tensors(q, k, v, k_ref, v_ref)
    method = methods.Method(mix="attention", replace_above=0 if mode == "replace" else 1000)
    return variation.mix_in_attention(controls(lam, method, ref_kv={"here": ref}))(q, k, v, HERE_SELF)


def mix_cross(q, k, v, k_ip, v_ip, lam, scale):
    q, k, v, *image = tensors(q, k, v, k_ip, v_ip)
    method = methods.Method(mix="attention", ip_scale=scale)
    return variation.mix_in_attention(controls(lam, method, ip_kv={"here": image}))(q, k, v, HERE_CROSS)


def lam_of(lam):
    if isinstance(lam, dict):
        kind, ends = next(iter(lam.items()))
        return {"linear": methods.Linear, "cosine": methods.Cosine}[kind](*ends)
    return lam


def lambda_at(lam, t, T):
    return np.array([methods.Method(lam=lam_of(lam)).lam_at(int(x), T) for x in t])


def guide(eps_u, eps_c, m):
    return variation.guide(torch.cat(tensors(eps_u, eps_c)), 2, m)


def adain(x, ref):
    return variation.adain(*tensors(x, ref))


def shuffle(z, order, seed):
    return start(z, methods.Method(init="shuffle"), seed)


def renew(z, noise, d, seed):
    return start(z, methods.Method(diversity=d), seed)


def start(z, method, *seeds):
    return variation.initial_latents(Reference(None, *tensors(z)), variation.Run("", method, seeds))


# ---- DDIM ------------------------------------------------------------------------------------------------------

def schedule(**settings):
    return ddim.Schedule(ScheduleConfig(**settings))


def alpha_bars(kind, train_steps, beta_start, beta_end):
    table = schedule(beta_schedule=kind, train_steps=train_steps, beta_start=beta_start, beta_end=beta_end)
    return np.array([table.alpha_bar(t) for t in range(train_steps)])


def level(t, alpha_to_one):
    return np.array([schedule(alpha_to_one=alpha_to_one).alpha_bar(int(x)) for x in t])


def timesteps(n, offset):
    return np.array(schedule(steps_offset=offset).steps(n))


def add_noise(x0, eps, alpha_bar):
    return ddim.add_noise(*tensors(x0, eps), alpha_bar)


def predict_x0(z, eps, alpha_bar):
    return ddim.predict_x0(*tensors(z, eps), alpha_bar)


def ddim_step(z, eps, alpha_bar, alpha_bar_prev):
    return ddim.step(*tensors(z, eps), alpha_bar, alpha_bar_prev)


def ddim_inverse_step(z, eps, alpha_bar_prev, alpha_bar):
    return ddim.inverse_step(*tensors(z, eps), alpha_bar_prev, alpha_bar)


def ddim_sample(z, eps, offset, alpha_to_one):
    z, eps = tensors(z, eps)
    table, path = schedule(steps_offset=offset, alpha_to_one=alpha_to_one), [z]
    for e, (t, t_prev) in zip(eps, table.steps(len(eps))):
        path.append(ddim.step(path[-1], e, table.alpha_bar(t), table.alpha_bar(t_prev)))
    return torch.stack(path)


def ddim_invert(z, eps, offset, alpha_to_one):
    z, eps = tensors(z, eps)
    table, path = schedule(steps_offset=offset, alpha_to_one=alpha_to_one), [z]
    for e, (t, t_prev) in zip(eps, table.steps(len(eps))[::-1]):
        path.append(ddim.inverse_step(path[-1], e, table.alpha_bar(t_prev), table.alpha_bar(t)))
    return torch.stack(path)


def timestep_embedding(t, dim):
    return layers.timestep_embedding(torch.from_numpy(t), dim)


# ---- networks, from the files as the package loads them --------------------------------------------------------

@lru_cache
def network(kind):
    part = find_part(HERE / "model" / FOLDERS[kind], kind, torch.float64)
    return load_into(build(part), part, torch.float64)


@lru_cache
def adapter_at(path):
    part = find_part(path, "ip_adapter", torch.float64)
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
    sizes = dict(channels=tuple(config["block_out_channels"]), layers_per_block=config["layers_per_block"],
                 attention=tuple(kind.startswith("Cross") for kind in config["down_block_types"]))
    with torch.device("meta"):
        module = unet_module.UNet(unet_module.UNetConfig(**sizes, **({"norm_groups": 4, "n_heads": 2}
                                                                     if sizes["channels"][0] < 32 else {})))
    return np.array([site.layer for site in numbered(module.sites).values()])


# ---- the method ------------------------------------------------------------------------------------------------

class Given(Model):
    """A model that is told contexts and image tokens instead of prompts and a picture."""

    def context(self, prompts):
        return torch.cat([self.files[prompt] for prompt in prompts])

    def image_tokens(self, image=None, embeds=None):
        return self.files["tokens"]

    def encode(self, pixels):
        return self.files["z0"]

    def check_size(self, size):
        return size


def model(adapter=None, **told):
    told = {name: torch.from_numpy(x) for name, x in told.items()}
    return Given(network("unet"), network("vae"), network("text"), None, ddim.Schedule(), None,
                 adapter and adapter_of(adapter), torch.device("cpu"), torch.float64, told)


@exact_time
def invert(weights, config, z0, source, steps):
    return invert_picture(model(source=source, z0=z0), Image.new("RGB", (8, 8)), steps, "source").chain


@exact_time
def algorithm1(weights, config, adapter, chain, context, source, tokens, settings, z_T, init, seeds):
    told = model(adapter, negative=context[:1], prompt=context[1:], source=source, tokens=tokens)
    settings = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
    method = methods.Method(init=init, **settings | {"lam": lam_of(settings["lam"])})
    run, path = variation.Run("prompt", method, tuple(seeds), "negative"), []
    ref = Reference(None, torch.from_numpy(chain), "source")
    [z_0] = variation.sample(told, ref, [run], on_step=lambda run, t, z, noise: path.append(z))
    return torch.stack([*path, z_0])


# ---- pictures and text -----------------------------------------------------------------------------------------

def vae_pixels(image, size, how):
    return images.to_tensor(images.fit(Image.fromarray(image), size, how))


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
