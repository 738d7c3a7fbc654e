"""isadca under the names and on the arrays of the vectors. Every function calls the package and nothing else.

One thing is exchanged: the package computes the sinusoids of the time step in float32, as in training, which would
bound what can be compared to 1e-5. Inside the UNet they are in float64 here; the package's own have their vectors.
The networks are in isadca_networks.py.
"""

import numpy as np
import torch
from PIL import Image

from isadca import attention as kernels, ddim, loop, methods
from isadca.networks import layers
from isadca.networks.model import Model
from isadca.reference import Reference, initial_latents, invert as invert_picture
from isadca_networks import (adapter_of, adapter_order, clip_image, clip_pixels, clip_text, clip_text_embed, exact_time,
                             image_keys_values, image_tokens, lpips, network, sifid, ssim, tensors, tokenize, unet,
                             unet_with_image, vae_decode, vae_encode, vae_pixels)

# offered as they are, beside what is defined here
__all__ = ["adapter_order", "clip_image", "clip_pixels", "clip_text", "clip_text_embed", "image_keys_values",
           "image_tokens", "lpips", "sifid", "ssim", "tokenize", "unet", "unet_with_image", "vae_decode", "vae_encode",
           "vae_pixels"]
HERE_SELF = kernels.Site("here", "self", "mid", 0)
HERE_CROSS = kernels.Site("here", "cross", "mid", 0)


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
    module(x_ref, x_ref, kernels.capture(kv))
    return module(x, x, kernels.isa(kv))


def dca(q, k, v, k_ip, v_ip, scale):
    q, k, v, *image = tensors(q, k, v, k_ip, v_ip)
    return kernels.dca({"here": image}, scale)(q, k, v, HERE_CROSS)


def dca_layer(x, text, image, w_q, w_k, w_v, w_k_ip, w_v_ip, heads):
    module = layer(heads, text.shape[2], w_q, w_k, w_v)
    module.site = HERE_CROSS
    x, text, image, w_k_ip, w_v_ip = tensors(x, text, image, w_k_ip, w_v_ip)
    kv = [layers.split_heads(image @ w.T, heads) for w in (w_k_ip, w_v_ip)]
    return module(x, text, kernels.dca({"here": kv}))


def controls(method, lam, z=None, ref_kv=None, ip_kv=None):
    """What one step of the package's loop is made of, without guidance; what is not read here is None."""
    told = dict.fromkeys(loop.Conditions._fields) | dict(context=torch.zeros(1, 1, 1), text_kv=[{}],
                                                          ip_kv=ip_kv or {})
    step = dict(t=500, lam=lam, z=torch.zeros(1, 4, 1, 1) if z is None else z, conditions=loop.Conditions(**told),
                ref_kv=ref_kv or {}, method=method, kernel=kernels.attend)
    return loop.Controls(**dict.fromkeys(loop.Controls._fields) | step)


def mix_noise(eps_isa, eps_dca, lam):
    """The package mixes in `predict`, so that is called, with a model whose branches give these."""
    isa_noise, dca_noise = tensors(eps_isa, eps_dca)

    class Both:
        def noise(self, z, t, context, attend, edit=None):
            return isa_noise if lam == 1 else dca_noise if lam == 0 else torch.cat([isa_noise, dca_noise])
    return loop.predict(Both(), controls(methods.Method(lam=lam, guidance=1.0), lam, z=isa_noise)).mixed


def mix_self(q, k, v, k_ref, v_ref, lam, mode):
    q, k, v, *ref = tensors(q, k, v, k_ref, v_ref)
    method = methods.Method(mix="attention", replace_above=0 if mode == "replace" else 1000)
    return loop.mix_in_attention(controls(method, lam, ref_kv={"here": ref}))(q, k, v, HERE_SELF)


def mix_cross(q, k, v, k_ip, v_ip, lam, scale):
    q, k, v, *image = tensors(q, k, v, k_ip, v_ip)
    method = methods.Method(mix="attention", ip_scale=scale)
    return loop.mix_in_attention(controls(method, lam, ip_kv={"here": image}))(q, k, v, HERE_CROSS)


def lam_of(lam):
    if isinstance(lam, dict):
        kind, ends = next(iter(lam.items()))
        return {"linear": methods.Linear, "cosine": methods.Cosine}[kind](*ends)
    return lam


def lambda_at(lam, t, T):
    return np.array([methods.Method(lam=lam_of(lam)).lam_at(int(x), T) for x in t])


def guide(eps_u, eps_c, m):
    return loop.guide(tensors(eps_u, eps_c), m)


def adain(x, ref):
    return loop.adain(*tensors(x, ref))


def shuffle(z, order, seed):
    return start(z, methods.Method(init="shuffle"), seed)


def renew(z, noise, d, seed):
    return start(z, methods.Method(diversity=d), seed)


def match_moments(z, noise, seed):
    return start(z, methods.Method(init="gaussian"), seed)


def start(z, method, *seeds):
    return initial_latents(Reference(None, *tensors(z)), method, seeds)


# ---- DDIM ------------------------------------------------------------------------------------------------------

def schedule(**settings):
    return ddim.Schedule(ddim.ScheduleConfig(**settings))


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


# ---- the method ------------------------------------------------------------------------------------------------

class Given(Model):
    """A model that is told the reference's contexts and the image's tokens instead of prompts and a picture."""

    def context(self, prompts):
        return torch.cat([self.files[prompt or "empty"] if isinstance(prompt, str) else prompt[None]
                          for prompt in prompts])

    def image_tokens(self, image=None, embeds=None):
        return self.files["tokens"]

    def encode(self, pixels):
        return self.files["z0"]

    def check_size(self, size):
        return size, size


def model(adapter=None, **told):
    told = {name: torch.from_numpy(x) for name, x in told.items()}
    return Given(unet=network("unet"), vae=network("vae"), text=network("text"), tokenizer=None, vision=None,
                 schedule=ddim.Schedule(), ip_adapter=adapter and adapter_of(adapter), device=torch.device("cpu"),
                 dtype=torch.float64, files=told)


@exact_time
def invert(weights, config, z0, source, steps):
    return invert_picture(model(source=source, z0=z0), Image.new("RGB", (8, 8)), steps, "source").chain


@exact_time
def algorithm1(weights, config, adapter, chain, context, source, empty, tokens, settings, z_T, init, seeds):
    negative, prompt, chain = tensors(*context, chain)
    settings = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
    method = methods.Method(init=init, **settings | {"lam": lam_of(settings["lam"])})
    run, path = loop.Run(prompt, method, tuple(seeds), negative), []
    told = model(adapter, source=source, empty=empty, tokens=tokens)
    [z_0] = loop.sample(told, Reference(None, chain, "source"), [run],
                        on_step=lambda run, t, z, noise: path.append(z))
    return torch.stack([*path, z_0])
