"""The method in NumPy alone, written from README.md beside it: the equations, DDIM, and Algorithm 1.

To be read next to that page. Nothing is batched or cached, so it is slow; it is right, which run.py shows. The networks
are in numpy_networks.py; preprocessing, tokenizer and metrics in numpy_pictures.py.
"""

import math

import numpy as np

from numpy_networks import (UNet, attention, clip_image, clip_text, clip_text_embed, image_tokens, merge, split,
                            timestep_embedding, vae_decode, vae_encode)
from numpy_pictures import clip_pixels, lpips, sifid, ssim, tokenize, vae_pixels

# offered as they are, beside what is defined here
__all__ = ["attention", "clip_image", "clip_pixels", "clip_text", "clip_text_embed", "image_tokens", "lpips", "sifid",
           "ssim", "timestep_embedding", "tokenize", "vae_decode", "vae_encode", "vae_pixels"]


# ---- 1. Attention ----------------------------------------------------------------------------------------------

def for_rows(x, rows):
    return np.repeat(x, rows // len(x), axis=0)


def isa(q, k, v, k_ref, v_ref, mode):
    k_ref, v_ref = for_rows(k_ref, len(q)), for_rows(v_ref, len(q))
    if mode == "replace":
        return attention(q, k_ref, v_ref)
    return attention(q, np.concatenate([k_ref, k], axis=2), np.concatenate([v_ref, v], axis=2))


def isa_layer(x, x_ref, w_q, w_k, w_v, heads):
    joined = np.concatenate([x_ref, x], axis=1)
    return merge(attention(split(x @ w_q.T, heads), split(joined @ w_k.T, heads), split(joined @ w_v.T, heads)))


def dca(q, k, v, k_ip, v_ip, scale):
    return attention(q, k, v) + scale * attention(q, for_rows(k_ip, len(q)), for_rows(v_ip, len(q)))


def dca_layer(x, text, image, w_q, w_k, w_v, w_k_ip, w_v_ip, heads):
    pairs = (x, w_q), (text, w_k), (text, w_v), (image, w_k_ip), (image, w_v_ip)
    return merge(dca(*(split(y @ w.T, heads) for y, w in pairs), 1.0))


# ---- 2. λ and noise --------------------------------------------------------------------------------------------

def mix_noise(eps_isa, eps_dca, lam):
    return lam * eps_isa + (1 - lam) * eps_dca


def mix_self(q, k, v, k_ref, v_ref, lam, mode):
    return (1 - lam) * attention(q, k, v) + lam * isa(q, k, v, k_ref, v_ref, mode)


def mix_cross(q, k, v, k_ip, v_ip, lam, scale):
    return dca(q, k, v, k_ip, v_ip, (1 - lam) * scale)


def lambda_at(lam, t, T):
    t = np.asarray(t, np.float64)
    if not isinstance(lam, dict):
        return np.full(t.shape, lam)
    kind, (first, last) = next(iter(lam.items()))
    return last + (first - last) * (t / T if kind == "linear" else (1 - np.cos(math.pi * t / T)) / 2)


def guide(eps_u, eps_c, m):
    return eps_u + m * (eps_c - eps_u)


def adain(x, ref):
    def moments(y):
        return y.mean((2, 3), keepdims=True), np.sqrt(y.var((2, 3), ddof=1, keepdims=True) + 1e-5)
    (mean, std), (ref_mean, ref_std) = moments(x), moments(ref)
    return (x - mean) / std * ref_std + ref_mean


def shuffle(z, order, seed=None):
    return z.reshape(*z.shape[:2], -1)[:, :, order].reshape(z.shape)


def match_moments(z, noise, seed=None):
    return z.mean((2, 3), keepdims=True) + z.std((2, 3), ddof=1, keepdims=True) * noise


def renew(z, noise, d, seed=None):
    return math.sqrt(1 - d) * z + math.sqrt(d) * noise


# ---- 3. The schedule and DDIM ----------------------------------------------------------------------------------

def alpha_bars(kind, train_steps, beta_start, beta_end):
    power = 1 if kind == "linear" else 2
    betas = np.linspace(beta_start ** (1 / power), beta_end ** (1 / power), train_steps) ** power
    return np.cumprod(1 - betas)


SD15 = alpha_bars("scaled_linear", 1000, 0.00085, 0.012)


def level(t, alpha_to_one):
    return np.array([SD15[x] if x >= 0 else 1.0 if alpha_to_one else SD15[0] for x in t])


def timesteps(n, offset):
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    stride = 1000 // n
    t = np.arange(n)[::-1] * stride + offset
    return np.stack([t, t - stride], axis=1)


def add_noise(x0, eps, alpha_bar):
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps


def predict_x0(z, eps, alpha_bar):
    return (z - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def ddim_step(z, eps, alpha_bar, alpha_bar_prev):
    return add_noise(predict_x0(z, eps, alpha_bar), eps, alpha_bar_prev)


def ddim_inverse_step(z, eps, alpha_bar_prev, alpha_bar):
    return add_noise(predict_x0(z, eps, alpha_bar_prev), eps, alpha_bar)


def ddim_sample(z, eps, offset, alpha_to_one):
    path = [z]
    for e, pair in zip(eps, timesteps(len(eps), offset)):
        path.append(ddim_step(path[-1], e, *level(pair, alpha_to_one)))
    return np.stack(path)


def ddim_invert(z, eps, offset, alpha_to_one):
    path = [z]
    for e, (t, t_prev) in zip(eps, timesteps(len(eps), offset)[::-1]):
        path.append(ddim_inverse_step(path[-1], e, *level([t_prev, t], alpha_to_one)))
    return np.stack(path)


# ---- 5. The networks, with an image ----------------------------------------------------------------------------

def unet(weights, config, z, t, context):
    return UNet(weights, config)(z, t, context)


def adapter_order(config):
    kinds, n = config["down_block_types"], config["layers_per_block"]
    attending = sum(kind.startswith("CrossAttn") for kind in kinds)
    down, total = attending * n, attending * (2 * n + 1) + 1
    return np.array([*range(down), *range(down + 1, total), down])


def image_keys_values(weights, config, tokens):
    names, pairs = UNet(None, config).names(), {}
    for i, layer in enumerate(adapter_order(config)):
        for x in "kv":
            w = weights[f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight"]
            pairs[f"{names[layer]}.attn2.{x}"] = split(tokens @ w.T, config["attention_head_dim"])
    return pairs


def unet_with_image(weights, config, adapter, z, t, context, tokens, scale):
    pairs = image_keys_values(adapter, config, tokens)

    def attend(name, q, k, v):
        if name.endswith("attn1"):
            return attention(q, k, v)
        return dca(q, k, v, pairs[f"{name}.k"], pairs[f"{name}.v"], scale)
    return UNet(weights, config)(z, t, context, attend)


# ---- 6. The method ---------------------------------------------------------------------------------------------

def invert(weights, config, z0, source, steps):
    network, chain = UNet(weights, config), [z0]
    for t, t_prev in timesteps(steps, 1)[::-1]:
        eps = network(chain[-1], [t], source)
        chain.append(ddim_inverse_step(chain[-1], eps, *level([t_prev, t], False)))
    return np.concatenate(chain)


def algorithm1(weights, config, adapter, chain, context, source, empty, tokens, settings, z_T, init, seeds):
    network, T = UNet(weights, config), len(chain) - 1
    image = image_keys_values(adapter, config, tokens)
    prompts = source if settings["ref_rows"] == 1 else np.concatenate([empty, source])
    path = [z_T]
    for i, (t, t_prev) in enumerate(timesteps(T, 1)):
        seen, eps_ref = see(network, chain[T - i: T - i + 1], t, prompts)
        z = [step(network, row[None], t, t_prev, seen, eps_ref, image, context, settings) for row in path[-1]]
        path.append(np.concatenate(z))
    return np.stack(path)


def see(network, z, t, prompts):
    """The keys and values of every self-attention over the reference, by name, and the last row's noise."""
    seen = {}

    def attend(name, q, k, v):
        if name.endswith("attn1"):
            seen[name] = k, v
        return attention(q, k, v)
    rows = len(prompts)
    return seen, network(np.repeat(z, rows, axis=0), [t] * rows, prompts, attend)[-1:]


def step(network, z, t, t_prev, seen, eps_ref, image, context, settings):
    """One variation (1,4,h,w), one step."""
    lam = float(lambda_at(settings["lam"], [t], 1000)[0])
    passes = rules(network, t, lam, seen, image, settings)

    def guided(attend):
        eps = network(np.repeat(z, 2, axis=0), [t, t], context, attend)
        return guide(eps[:1], eps[1:], settings["guidance"])
    noise = [guided(attend) for attend in passes]
    eps_isa, eps_dca = noise[0], noise[-1]
    if t > settings["adain_above"]:
        eps_isa = adain(eps_isa, eps_ref)
    return ddim_step(z, mix_noise(eps_isa, eps_dca, lam), *level([t, t_prev], False))


def rules(network, t, lam, seen, image, settings):
    """What each pass of the network attends to: one for both branches, or the ISA branch's and the DCA branch's."""
    scale, names = settings["ip_scale"], network.names()
    mode = "replace" if t > settings["replace_above"] else "append"
    layers = range(len(names)) if settings["layers"] is None else settings["layers"]
    controlled = {f"{names[layer]}.attn1" for layer in layers}

    def plain(name, q, k, v):
        return attention(q, k, v)

    def isa_branch(name, q, k, v):
        return isa(q, k, v, *seen[name], mode) if name in controlled else plain(name, q, k, v)

    def dca_branch(name, q, k, v):
        return dca(q, k, v, image[f"{name}.k"], image[f"{name}.v"], scale) if "attn2" in name else plain(name, q, k, v)

    def both(name, q, k, v):
        if "attn2" in name:
            return mix_cross(q, k, v, image[f"{name}.k"], image[f"{name}.v"], lam, scale)
        return mix_self(q, k, v, *seen[name], lam, mode) if name in controlled else plain(name, q, k, v)
    if not settings["k"] < t <= settings["t_start"]:
        return [plain]
    if settings["mix"] == "attention":
        return [both]
    return [isa_branch] if lam == 1 else [dca_branch] if lam == 0 else [isa_branch, dca_branch]
