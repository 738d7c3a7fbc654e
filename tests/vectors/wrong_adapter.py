"""An implementation that is wrong on purpose, in every function and for every vector, each time by a real mistake.

It is `numpy_isadca` with something exchanged. THIRTEEN holds the classic mistakes one by one, under the words in which
the runner has to recognise them.
"""

import itertools
from unittest import mock

import numpy as np

import numpy_isadca as right
import numpy_networks as networks
import numpy_pictures as pictures
from numpy_isadca import attention as attend, merge, split

# ---- equations: what the sections 1 to 3 describe, wrongly ------------------------------------------------------


def attention(q, k, v, causal=False):
    """The softmax runs over the queries."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    powers = np.exp(scores - scores.max(-2, keepdims=True))
    return powers / powers.sum(-2, keepdims=True) @ v


def isa(q, k, v, k_ref, v_ref, mode):
    return attend(q, k, v)


def isa_layer(heads, w_q, **others):
    return right.isa_layer(heads=len(w_q) // heads, w_q=w_q, **others)


def dca(q, k, v, k_ip, v_ip, scale):
    k_ip, v_ip = (right.for_rows(x, len(q)) for x in (k_ip, v_ip))
    return attend(q, np.concatenate([k, k_ip], axis=2), np.concatenate([v, v_ip], axis=2))


def dca_layer(w_k, w_v, w_k_ip, w_v_ip, **others):
    return right.dca_layer(w_k=w_k, w_v=w_v, w_k_ip=w_k, w_v_ip=w_v, **others)


def mix_noise(lam, **others):
    return right.mix_noise(lam=1 - lam, **others)


def mix_self(lam, **others):
    return right.mix_self(lam=1 - lam, **others)


def mix_cross(lam, **others):
    return right.mix_cross(lam=1 - lam, **others)


def lambda_at(lam, t, T):
    if isinstance(lam, dict):
        return right.lambda_at({kind: ends[::-1] for kind, ends in lam.items()}, t, T)
    return 1 - right.lambda_at(lam, t, T)


def guide(eps_u, eps_c, m):
    return eps_c + m * (eps_c - eps_u)


def adain(x, ref):
    """The variance is divided by n."""
    (mean, std), (ref_mean, ref_std) = (
        (y.mean((2, 3), keepdims=True), np.sqrt(y.var((2, 3), keepdims=True) + 1e-5)) for y in (x, ref))
    return (x - mean) / std * ref_std + ref_mean


def shuffle(z, order, seed):
    return right.shuffle(z, np.argsort(order))


def match_moments(z, noise, seed):
    return z.mean((2, 3), keepdims=True) + z.std((2, 3), keepdims=True) * noise


def renew(z, noise, d, seed):
    return (1 - d) * z + d * noise


def alpha_bars(kind, **others):
    return right.alpha_bars("linear" if kind == "scaled_linear" else "scaled_linear", **others)


def level(t, alpha_to_one):
    return right.level(t, not alpha_to_one)


def timesteps(n, offset):
    return right.timesteps(n, 1 - offset) if n else np.empty((0, 2))


def add_noise(x0, eps, alpha_bar):
    return alpha_bar * x0 + (1 - alpha_bar) * eps


def predict_x0(z, eps, alpha_bar):
    return z - np.sqrt(1 - alpha_bar) * eps


def ddim_step(z, eps, alpha_bar, alpha_bar_prev):
    return right.predict_x0(z, eps, alpha_bar)


def ddim_inverse_step(z, eps, alpha_bar_prev, alpha_bar):
    return right.ddim_step(z, eps, alpha_bar, alpha_bar_prev)


def ddim_sample(alpha_to_one, **others):
    return right.ddim_sample(alpha_to_one=not alpha_to_one, **others)


def ddim_invert(alpha_to_one, **others):
    return right.ddim_invert(alpha_to_one=not alpha_to_one, **others)


def timestep_embedding(t, dim):
    return np.roll(right.timestep_embedding(t, dim), dim // 2, axis=1)


def finite_mask(q, k, v, causal=False):
    later = np.triu(np.ones((q.shape[2], k.shape[2])), 1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + (-1e9 * later if causal else 0)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ v


# ---- networks --------------------------------------------------------------------------------------------------

def widths_for_heads(self, w, x, context, attend):
    heads = len(w["to_q.weight"]) // self.heads
    inputs = ("to_q", x), ("to_k", context), ("to_v", context)
    q, k, v = (split(w(name).linear(y), heads) for name, y in inputs)
    return w("to_out.0").linear(merge(attend(w.prefix[:-1], q, k, v)))


def unet(**arguments):
    with mock.patch.object(networks.UNet, "attend_layer", widths_for_heads):
        return right.unet(**arguments)


def eps_1e_5(self, x, groups, eps, group_norm=networks.Weights.group_norm):
    return group_norm(self, x, groups, 1e-5)


def unet_with_one_eps(**arguments):
    with mock.patch.object(networks.Weights, "group_norm", eps_1e_5):
        return right.unet(**arguments)


def symmetric(self, x, padding=0, stride=1, conv=networks.Weights.conv):
    return conv(self, x, 1 if padding == ((0, 1), (0, 1)) else padding, stride)


def vae_encode(**arguments):
    with mock.patch.object(networks.Weights, "conv", symmetric):
        return right.vae_encode(**arguments)


def vae_decode(config, **others):
    return right.vae_decode(config=config | {"scaling_factor": 1.0}, **others)


def clip_text(**arguments):
    with mock.patch.object(networks, "quick_gelu", lambda x: x / (1 + np.exp(-1.773 * x))):
        return right.clip_text(**arguments)


def clip_text_embed(weights, config, ids):
    at = (ids == config["eos_token_id"]).argmax(1)
    return right.clip_text(weights, config, ids)[np.arange(len(ids)), at] @ weights["text_projection.weight"].T


def clip_image(config, **others):
    return right.clip_image(config=config | {"hidden_act": "quick_gelu"}, **others)


def image_tokens(**arguments):
    tokens = right.image_tokens(**arguments)
    return tokens * np.array([0, 1])[:, None, None]


def image_keys_values(**arguments):
    pairs = right.image_keys_values(**arguments)
    return {f"{name[:-1]}{'v' if name[-1] == 'k' else 'k'}": x for name, x in pairs.items()}


def adapter_order(config):
    return np.sort(right.adapter_order(config))


def unet_with_image(scale, **others):
    return right.unet_with_image(scale=0.0, **others)


# ---- the method ------------------------------------------------------------------------------------------------

def invert(**arguments):
    """The network is told the time of the lower level."""
    class Lower(networks.UNet):
        def __call__(self, z, t, context):
            return super().__call__(z, [max(t[0] - 1000 // arguments["steps"], 0)], context)
    with mock.patch.object(right, "UNet", Lower):
        return right.invert(**arguments)


def algorithm1(**arguments):
    """Lambda is the wrong way round."""
    with mock.patch.object(right, "lambda_at", lambda *args, lambda_at=right.lambda_at: 1 - lambda_at(*args)):
        return right.algorithm1(**arguments)


def one_step_late(chain, **others):
    return right.algorithm1(chain=np.concatenate([chain[1:], chain[-1:]]), **others)


def counted_phases(**arguments):
    """A counter that is set back at 0 only; the first picture leaves it above, so the second starts with the rest."""
    stride = 1000 // (len(arguments["chain"]) - 1)
    counter = itertools.chain([1000 % stride - stride], itertools.count(1000 - stride, -stride))

    def rules(network, t, lam, seen, image, settings, rules=right.rules):
        phase = next(counter) + 1  # what the original calls t - 1
        shifted = settings | {"replace_above": settings["replace_above"] + t - phase}
        return rules(network, t, lam, seen, image, shifted)
    with mock.patch.object(right, "rules", rules):
        return right.algorithm1(**arguments)


def one_variation_only(z_T, **others):
    with mock.patch.object(right, "isa", isa if len(z_T) > 1 else right.isa):
        return right.algorithm1(z_T=z_T, **others)


# ---- pictures, text, metrics -----------------------------------------------------------------------------------

def vae_pixels(**arguments):
    return (right.vae_pixels(**arguments) + 1) / 2


def clip_pixels(**arguments):
    with mock.patch.object(pictures, "rgb", lambda image, rgb=pictures.rgb: rgb(image)[..., ::-1] / 2):
        return right.clip_pixels(**arguments)


def tokenize(**arguments):
    ids = right.tokenize(**arguments)
    end = arguments["vocab"]["<|endoftext|>"]
    for row in ids:
        last = len(row) - 1
        while row[last - 1] == end:
            last -= 1
        row[last + 1:] = 0
    return ids


def ssim(a, b):
    return 1 - right.ssim(a, b)


def lpips(a, b, trunk, **others):
    """The features are not of unit length, nor is the input scaled."""
    return right.lpips(a, b, trunk={name: 2 * x for name, x in trunk.items()}, **others)


def sifid(a, b, inception):
    return np.sqrt(right.sifid(a, b, inception))


THIRTEEN = {
    "your reference is one step late": ("algorithm1", one_step_late),
    "the phase is counted by calls and not read off t: a second picture starts in the wrong one":
        ("algorithm1", counted_phases),
    "the reference is left out when there is more than one variation": ("algorithm1", one_variation_only),
    "the encoder's downsampling pads all four sides, it pads right and bottom only": ("vae_encode", vae_encode),
    "the group norm before a transformer has eps 1e-5, it is 1e-6 there": ("unet", unet_with_one_eps),
    "quick_gelu's constant is 1.773, it is 1.702": ("clip_text", clip_text),
    "prompts are padded with token 0, Stable Diffusion 1 was trained with the end token": ("tokenize", tokenize),
    "the pooled text is at the token that eos_token_id names": ("clip_text_embed", clip_text_embed),
    "attention_head_dim is taken as the width of a head, it is the number of heads": ("unet", unet),
    "the causal mask is a finite number, added": ("attention", finite_mask),
    "the last step ends at level 1": ("level", level),
    "sines come before cosines": ("timestep_embedding", timestep_embedding),
    "zero steps give an empty loop, not an error": ("timesteps", timesteps),
}
