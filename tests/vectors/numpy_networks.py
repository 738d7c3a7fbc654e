"""The networks in NumPy, from sections 4 and 5 of README.md: UNet, VAE, CLIP, IP-Adapter."""

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


# ---- building blocks -------------------------------------------------------------------------------------------

class Weights:
    """Arrays by key, seen from a prefix: Weights(w)("conv_in")["weight"]."""

    def __init__(self, arrays, prefix=""):
        self.arrays, self.prefix = arrays, prefix

    def __call__(self, name):
        return Weights(self.arrays, f"{self.prefix}{name}.")

    def __getitem__(self, name):
        return self.arrays[self.prefix + name]

    def __contains__(self, name):
        return self.prefix + name in self.arrays

    def linear(self, x):
        return x @ self["weight"].T + (self["bias"] if "bias" in self else 0)

    def layer_norm(self, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * self["weight"] + self["bias"]

    def group_norm(self, x, groups, eps):
        grouped = x.reshape(len(x), groups, -1)
        centred = grouped - grouped.mean(-1, keepdims=True)
        normed = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)).reshape(x.shape)
        return normed * self["weight"][:, None, None] + self["bias"][:, None, None]

    def conv(self, x, padding=0, stride=1):
        """`padding` on all four sides, or ((top, bottom), (left, right))."""
        w = self["weight"]
        if w.shape[2:] == (1, 1):  # a matrix for each cell
            y = (w[:, :, 0, 0] @ x.reshape(*x.shape[:2], -1)).reshape(len(x), -1, *x.shape[2:])
        else:
            windows = sliding_window_view(pad(x, padding), w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
            y = np.tensordot(windows, w, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
        return y + self["bias"][:, None, None] if "bias" in self else y


def pad(x, padding):
    """Zeros around the grid; np.pad does the same, more slowly."""
    (top, bottom), (left, right) = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    b, c, h, w = x.shape
    wider = np.zeros((b, c, top + h + bottom, left + w + right), x.dtype)
    wider[:, :, top: top + h, left: left + w] = x
    return wider


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2)).ravel()), x.dtype, x.size).reshape(x.shape)
    return x * (1 + erf) / 2


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def up(x):
    return x.repeat(2, axis=2).repeat(2, axis=3)


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def merge(x):
    return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)


def attention(q, k, v, causal=False):
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ v


def timestep_embedding(t, dim):
    angles = np.asarray(t)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def resnet(w, x, groups, eps, temb=None):
    y = w("conv1").conv(silu(w("norm1").group_norm(x, groups, eps)), 1)
    if temb is not None:
        y = y + w("time_emb_proj").linear(silu(temb))[:, :, None, None]
    y = w("conv2").conv(silu(w("norm2").group_norm(y, groups, eps)), 1)
    return y + (w("conv_shortcut").conv(x) if "conv_shortcut.weight" in w else x)


def to_tokens(x):
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


def to_cells(x, shape):
    return x.swapaxes(1, 2).reshape(len(x), -1, *shape)


# ---- UNet ------------------------------------------------------------------------------------------------------

class UNet:
    """The UNet with its attention as a function (name, q, k, v) -> y; the name ends in attn1 (self) or attn2."""

    def __init__(self, weights, config):
        self.w, self.config = Weights(weights), config
        self.groups, self.heads = config["norm_num_groups"], config["attention_head_dim"]

    def attend_layer(self, w, x, context, attend):
        inputs = ("to_q", x), ("to_k", context), ("to_v", context)
        q, k, v = (split(w(name).linear(y), self.heads) for name, y in inputs)
        return w("to_out.0").linear(merge(attend(w.prefix[:-1], q, k, v)))

    def transformer(self, w, x, context, attend):
        block = w("transformer_blocks.0")
        y = to_tokens(w("proj_in").conv(w("norm").group_norm(x, self.groups, 1e-6)))
        normed = block("norm1").layer_norm(y)
        y = y + self.attend_layer(block("attn1"), normed, normed, attend)
        y = y + self.attend_layer(block("attn2"), block("norm2").layer_norm(y), context, attend)
        value, gate = np.split(block("ff.net.0.proj").linear(block("norm3").layer_norm(y)), 2, axis=-1)
        y = y + block("ff.net.2").linear(value * gelu(gate))
        return x + w("proj_out").conv(to_cells(y, x.shape[2:]))

    def __call__(self, z, t, context, attend=lambda name, q, k, v: attention(q, k, v)):
        w, config = self.w, self.config
        n, levels = config["layers_per_block"], len(config["block_out_channels"])
        attends = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
        temb = timestep_embedding(t, config["block_out_channels"][0]).astype(z.dtype)
        temb = w("time_embedding.linear_2").linear(silu(w("time_embedding.linear_1").linear(temb)))

        def layer(block, j, x, level):
            x = resnet(block(f"resnets.{j}"), x, self.groups, 1e-5, temb)
            return self.transformer(block(f"attentions.{j}"), x, context, attend) if attends[level] else x
        x = w("conv_in").conv(z, 1)
        skips = [x]
        for i in range(levels):
            block = w(f"down_blocks.{i}")
            for j in range(n):
                x = layer(block, j, x, i)
                skips.append(x)
            if i < levels - 1:
                x = block("downsamplers.0.conv").conv(x, 1, 2)
                skips.append(x)
        middle = w("mid_block")
        x = resnet(middle("resnets.0"), x, self.groups, 1e-5, temb)
        x = self.transformer(middle("attentions.0"), x, context, attend)
        x = resnet(middle("resnets.1"), x, self.groups, 1e-5, temb)
        for i in range(levels):
            block, level = w(f"up_blocks.{i}"), levels - 1 - i
            for j in range(n + 1):
                x = layer(block, j, np.concatenate([x, skips.pop()], axis=1), level)
            if level > 0:
                x = block("upsamplers.0.conv").conv(up(x), 1)
        return w("conv_out").conv(silu(w("conv_norm_out").group_norm(x, self.groups, 1e-5)), 1)

    def names(self):
        """The transformers' key prefixes in the order of execution."""
        n, kinds = self.config["layers_per_block"], self.config["down_block_types"]
        down = [f"down_blocks.{i}.attentions.{j}" for i, kind in enumerate(kinds) if kind.startswith("CrossAttn")
                for j in range(n)]
        upward = [f"up_blocks.{i}.attentions.{j}" for i, kind in enumerate(reversed(kinds))
                  if kind.startswith("CrossAttn") for j in range(n + 1)]
        return [f"{name}.transformer_blocks.0" for name in [*down, "mid_block.attentions.0", *upward]]


# ---- VAE -------------------------------------------------------------------------------------------------------

def vae_middle(w, x, groups):
    x = resnet(w("resnets.0"), x, groups, 1e-6)
    a = w("attentions.0")
    tokens = to_tokens(a("group_norm").group_norm(x, groups, 1e-6))
    q, k, v = (a(name).linear(tokens)[:, None] for name in ("to_q", "to_k", "to_v"))
    x = x + to_cells(a("to_out.0").linear(attention(q, k, v)[:, 0]), x.shape[2:])
    return resnet(w("resnets.1"), x, groups, 1e-6)


def vae_encode(weights, config, pixels):
    w, groups, levels = Weights(weights), config["norm_num_groups"], len(config["block_out_channels"])
    x = w("encoder.conv_in").conv(pixels, 1)
    for i in range(levels):
        block = w(f"encoder.down_blocks.{i}")
        for j in range(config["layers_per_block"]):
            x = resnet(block(f"resnets.{j}"), x, groups, 1e-6)
        if i < levels - 1:
            x = block("downsamplers.0.conv").conv(x, ((0, 1), (0, 1)), 2)
    x = vae_middle(w("encoder.mid_block"), x, groups)
    x = w("encoder.conv_out").conv(silu(w("encoder.conv_norm_out").group_norm(x, groups, 1e-6)), 1)
    mean, _ = np.split(w("quant_conv").conv(x), 2, axis=1)
    return mean * config["scaling_factor"]


def vae_decode(weights, config, z):
    w, groups, levels = Weights(weights), config["norm_num_groups"], len(config["block_out_channels"])
    x = w("decoder.conv_in").conv(w("post_quant_conv").conv(z / config["scaling_factor"]), 1)
    x = vae_middle(w("decoder.mid_block"), x, groups)
    for i in range(levels):
        block = w(f"decoder.up_blocks.{i}")
        for j in range(config["layers_per_block"] + 1):
            x = resnet(block(f"resnets.{j}"), x, groups, 1e-6)
        if i < levels - 1:
            x = block("upsamplers.0.conv").conv(up(x), 1)
    return w("decoder.conv_out").conv(silu(w("decoder.conv_norm_out").group_norm(x, groups, 1e-6)), 1)


# ---- CLIP ------------------------------------------------------------------------------------------------------

def clip_layers(w, x, config, causal):
    """The input of each layer, and the output of the last."""
    act = {"gelu": gelu, "quick_gelu": quick_gelu}[config["hidden_act"]]
    states, heads = [x], config["num_attention_heads"]
    for i in range(config["num_hidden_layers"]):
        layer = w(f"encoder.layers.{i}")
        normed, a = layer("layer_norm1").layer_norm(x), layer("self_attn")
        q, k, v = (split(a(name).linear(normed), heads) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + a("out_proj").linear(merge(attention(q, k, v, causal)))
        x = x + layer("mlp.fc2").linear(act(layer("mlp.fc1").linear(layer("layer_norm2").layer_norm(x))))
        states.append(x)
    return states


def clip_text(weights, config, ids):
    w = Weights(weights)("text_model")
    x = w["embeddings.token_embedding.weight"][ids] + w["embeddings.position_embedding.weight"][: ids.shape[1]]
    return w("final_layer_norm").layer_norm(clip_layers(w, x, config, causal=True)[-1])


def clip_text_embed(weights, config, ids):
    first = (ids == config["vocab_size"] - 1).argmax(1)
    return clip_text(weights, config, ids)[np.arange(len(ids)), first] @ weights["text_projection.weight"].T


def clip_image(weights, config, pixels):
    w = Weights(weights)("vision_model")
    patches = to_tokens(w("embeddings.patch_embedding").conv(pixels, stride=config["patch_size"]))
    first = np.broadcast_to(w["embeddings.class_embedding"], (len(pixels), 1, patches.shape[2]))
    x = np.concatenate([first, patches], axis=1) + w["embeddings.position_embedding.weight"]
    states = clip_layers(w, w("pre_layrnorm").layer_norm(x), config, causal=False)
    embeds = Weights(weights)("visual_projection").linear(w("post_layernorm").layer_norm(states[-1][:, 0]))
    return {"embeds": embeds, "states": states[-2]}


# ---- IP-Adapter ------------------------------------------------------------------------------------------------

def image_tokens(weights, features, nothing):
    w, x = Weights(weights)("image_proj"), np.concatenate([nothing, features])
    if "norm.weight" in w:
        return w("norm").layer_norm(w("proj").linear(x).reshape(len(x), -1, len(w["norm.weight"])))
    if "proj.3.weight" in w:
        return w("proj.3").layer_norm(w("proj.2").linear(gelu(w("proj.0").linear(x))))
    x, latents, i = w("proj_in").linear(x), np.repeat(w["latents"], len(x), axis=0), 0
    while f"layers.{i}.0.to_q.weight" in w:
        layer = w(f"layers.{i}")
        a, b = layer("0.norm1").layer_norm(x), layer("0.norm2").layer_norm(latents)
        q = layer("0.to_q").linear(b)
        k, v = np.split(layer("0.to_kv").linear(np.concatenate([a, b], axis=1)), 2, axis=-1)
        heads = q.shape[-1] // 64
        latents = latents + layer("0.to_out").linear(merge(attention(*(split(y, heads) for y in (q, k, v)))))
        latents = latents + layer("1.3").linear(gelu(layer("1.1").linear(layer("1.0").layer_norm(latents))))
        i += 1
    return w("norm_out").layer_norm(w("proj_out").linear(latents))
