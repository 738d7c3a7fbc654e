"""Vectors of the networks: diffusers' and transformers' own, at tiny sizes, in float64, with random weights.

The weights are numbers that float16 holds exactly and are written to model/ in the layouts in which the real ones are
published. Each mistake is made in the library's network, by turning one of its settings.
"""

import math
from contextlib import contextmanager

import numpy as np
import torch

from cases import Case, File
from make_ddim import sinusoids
from tiny import ADAPTERS, SD15, SIZES, adapter_shapes, build

TOLERANCE = 1e-9
STORED = {"unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model",
          "text": "text_encoder/model", "vision": "image_encoder/model"}


def random_weights(shapes, seed):
    """Weights under which activations stay of order one; gains and biases are random, too, so that each matters."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes.items()):
        if "position_ids" in name:
            continue
        x = rng.standard_normal(shape)
        if len(shape) == 1:
            x = 0.2 * x + (1.0 if name.endswith("weight") else 0.0)
        else:
            x *= 1.4 / math.sqrt(math.prod(shape[1:]))
        weights[name] = x.astype(np.float16)
    return weights


class ExactTime(torch.nn.Module):
    """The sinusoids in float64; the library's are in float32, which would bound what can be compared to 1e-5."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        return torch.from_numpy(np.hstack(sinusoids(t.numpy(), self.dim)))


def network(kind):
    """A library's network in float64 with its tiny weights, and these."""
    model = build(kind)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    weights = random_weights(shapes, seed=sorted(STORED).index(kind))
    state = {name: torch.from_numpy(x.astype(np.float64)) for name, x in weights.items()}
    model = model.double().eval().requires_grad_(False)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in key for key in missing.missing_keys)
    if kind == "unet":
        model.time_proj = ExactTime(SIZES["unet"]["block_out_channels"][0])
    return model, weights


def adapter_weights(family):
    return random_weights(adapter_shapes(family), seed=10 + ADAPTERS.index(family))


def model_files():
    """Every file of model/: path -> arrays or settings."""
    files = {f"model/ip-adapter_{family}.safetensors": adapter_weights(family) for family in ADAPTERS}
    for kind, path in STORED.items():
        files[f"model/{path}.safetensors"] = network(kind)[1]
        files[f"model/{path.split('/')[0]}/config.json"] = SIZES[kind]
    return files


def stored(kind):
    path = f"model/{STORED[kind]}"
    return dict(weights=File(f"{path}.safetensors"), config=File(f"model/{path.split('/')[1]}/config.json"))


@contextmanager
def changed(modules, **attributes):
    """The modules with other attributes while the block runs."""
    modules = list(modules)
    before = [{name: getattr(m, name) for name in attributes} for m in modules]
    for m in modules:
        for name, value in attributes.items():
            setattr(m, name, value)
    yield
    for m, old in zip(modules, before):
        for name, value in old.items():
            setattr(m, name, value)


def named(model, end):
    return [module for name, module in model.named_modules() if name.endswith(end)]


def norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm) and m.eps == 1e-6]


# ---- UNet ------------------------------------------------------------------------------------------------------

def unet_cases(rng):
    unet, _ = network("unet")
    z, context = rng.standard_normal((3, 4, 8, 4)), rng.standard_normal((3, 5, 12))
    t = np.array([981, 1, 500])

    def run():
        return unet(*(torch.from_numpy(x) for x in (z, t, context))).sample.numpy()
    right, mistakes = run(), {}
    with changed(norms(unet), eps=1e-5):
        mistakes["the group norm before a transformer has eps 1e-5, it is 1e-6 there"] = run()
    others = [m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm) and m.eps == 1e-5]
    with changed(others, eps=1e-6):
        mistakes["the resnets' group norm has eps 1e-6, it is 1e-5 there"] = run()
    attentions = [(m, m.heads) for m in named(unet, "attn1") + named(unet, "attn2")]
    for m, heads in attentions:
        m.heads = m.to_q.out_features // heads
    mistakes["attention_head_dim is taken as the width of a head, it is the number of heads"] = run()
    for m, heads in attentions:
        m.heads = heads
    tanh = torch.nn.functional.gelu
    with changed(named(unet, "ff.net.0"), gelu=lambda x: tanh(x, approximate="tanh")):
        mistakes["the feed-forward's GELU is the tanh approximation"] = run()
    with changed([unet.time_proj], forward=lambda t: torch.from_numpy(np.hstack(sinusoids(t.numpy(), 8)[::-1]))):
        mistakes["sines come before cosines in the time embedding"] = run()
    yield Case("unet", "a time step for each row", dict(stored("unet"), z=z, t=t, context=context), right, TOLERANCE,
               mistakes)


# ---- VAE -------------------------------------------------------------------------------------------------------

def vae_cases(rng):
    vae, _ = network("vae")
    pixels, z = rng.uniform(-1, 1, (2, 3, 12, 8)), rng.standard_normal((2, 4, 6, 4))
    scale = vae.config.scaling_factor

    def encode():
        return (vae.encode(torch.from_numpy(pixels)).latent_dist.mode() * scale).numpy()

    def decode():
        return vae.decode(torch.from_numpy(z / scale)).sample.numpy()
    encoded, decoded = encode(), decode()
    with changed(norms(vae), eps=1e-5):
        eps_mistakes = [{"the VAE's group norm has eps 1e-5, it is 1e-6 there": run()} for run in (encode, decode)]
    downsamplers = named(vae, "downsamplers.0")
    with changed(downsamplers, padding=1), changed([m.conv for m in downsamplers], padding=(1, 1)):
        shifted = encode()
    yield Case("vae_encode", "the posterior's mean, scaled", dict(stored("vae"), pixels=pixels), encoded, TOLERANCE, {
        "the encoder's downsampling pads all four sides, it pads right and bottom only": shifted,
        "the latent is not multiplied by the scaling factor": encoded / scale, **eps_mistakes[0]})
    yield Case("vae_decode", "not clipped", dict(stored("vae"), z=z), decoded, TOLERANCE, {
        "the latent is not divided by the scaling factor":
        vae.decode(torch.from_numpy(z)).sample.numpy(), **eps_mistakes[1]})


# ---- CLIP ------------------------------------------------------------------------------------------------------

def quick_gelu(x, constant=1.702):
    return x * torch.sigmoid(constant * x)


def text_cases(rng):
    text, _ = network("text")
    end = SIZES["text"]["vocab_size"] - 1
    ids = np.array([[end - 1, 2, 5, 9, end, end, end, end], [end - 1, 7, 2, 30, 8, 3, end, end],
                    [end - 1, 1, 4, 6, 3, 12, 11, end]])

    def run():
        return text(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    right, activations, mistakes = run(), named(text, "activation_fn"), {}
    with changed(activations, forward=lambda x: quick_gelu(x, 1.773)):
        mistakes["quick_gelu's constant is 1.773, it is 1.702"] = run()
    with changed(activations, forward=torch.nn.functional.gelu):
        mistakes["the text encoder's GELU is the exact one, it is quick_gelu"] = run()
    with changed([text.text_model.final_layer_norm], forward=lambda x: x):
        mistakes["the last layer norm is missing"] = run()
    yield Case("clip_text", "every token's state", dict(stored("text"), ids=ids), right, TOLERANCE, mistakes)
    project = text.text_projection.weight.numpy().T
    first = np.array([4, 6, 7])
    pooled = right[np.arange(3), first] @ project
    yield Case("clip_text_embed", "the first end token's state, projected", dict(stored("text"), ids=ids), pooled,
               TOLERANCE, {
        "the pooled text is at the token that eos_token_id names": right[[0, 1, 2], [1, 2, 0]] @ project,
        "the pooled text is at the last token": right[:, -1] @ project})
    assert np.abs(text(input_ids=torch.from_numpy(ids)).text_embeds.numpy() - pooled).max() < 1e-12


def vision_cases(rng):
    vision, _ = network("vision")
    pixels = rng.standard_normal((2, 3, 12, 12))

    def run():
        out = vision(torch.from_numpy(pixels), output_hidden_states=True)
        return {"embeds": out.image_embeds.numpy(), "states": out.hidden_states[-2].numpy()}
    right, mistakes = run(), {}
    with changed(named(vision, "activation_fn"), forward=quick_gelu):
        mistakes["the image encoder's GELU is quick_gelu, it is the exact one"] = run()
    last = vision(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-1].numpy()
    mistakes["the states are the last layer's, they are those before it"] = right | {"states": last}
    length = np.linalg.norm(right["embeds"], axis=1, keepdims=True)
    mistakes["the embedding is normalised to length 1"] = right | {"embeds": right["embeds"] / length}
    yield Case("clip_image", "embedding and states", dict(stored("vision"), pixels=pixels), right, TOLERANCE, mistakes)


# ---- IP-Adapter ------------------------------------------------------------------------------------------------

def adapted_unet(family):
    """A UNet that diffusers has given the adapter, and what turns an image's features into tokens."""
    unet, _ = network("unet")
    nested = {"image_proj": {}, "ip_adapter": {}}
    for key, x in adapter_weights(family).items():
        part, name = key.split(".", 1)
        nested[part][name] = torch.from_numpy(x.astype(np.float64))
    unet._load_ip_adapter_weights([nested], low_cpu_mem_usage=False)
    unet.double().requires_grad_(False)
    return unet, unet.encoder_hid_proj.image_projection_layers[0]


def keys_values(unet, tokens):
    """K' and V' of each cross-attention by its name."""
    names = [n.removesuffix(".processor") for n in unet.attn_processors if ".attn2." in n]
    pairs, heads = {}, SIZES["unet"]["attention_head_dim"]
    for name in names:
        processor = unet.attn_processors[f"{name}.processor"]
        for x, project in (("k", processor.to_k_ip[0]), ("v", processor.to_v_ip[0])):
            y = project(torch.from_numpy(tokens)).numpy()
            pairs[f"{name}.{x}"] = y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    return pairs


def adapter_cases(rng):
    for family in ADAPTERS:
        unet, project = adapted_unet(family)
        wide = SIZES["vision"]["hidden_size"]
        shape = (1, SIZES["vision"]["projection_dim"]) if family == "base" else (1, 10, wide)
        features = rng.standard_normal(shape)
        nothing = np.zeros(shape) if family == "base" else rng.standard_normal(shape)
        tokens = project(torch.from_numpy(np.concatenate([nothing, features]))).numpy()
        weights = File(f"model/ip-adapter_{family}.safetensors")
        swapped, zero = tokens[::-1].copy(), tokens.copy()
        zero[0] = 0
        yield Case("image_tokens", family, dict(weights=weights, features=features, nothing=nothing), tokens,
                   TOLERANCE, {
            "the unconditional tokens are zeros, they are the projection of the zero embedding": zero,
            "the image comes before the unconditional half": swapped})
        pairs, context = keys_values(unet, tokens), np.random.default_rng(3).standard_normal((2, 5, 12))
        yield Case("image_keys_values", family, dict(weights=weights, config=File("model/unet/config.json"),
                                                     tokens=tokens), pairs, TOLERANCE, {
            "keys and values are swapped": {f"{k[:-1]}{'v' if k[-1] == 'k' else 'k'}": x for k, x in pairs.items()}})
        z, t = rng.standard_normal((2, 4, 8, 4)), np.array([981, 981])
        inputs = [torch.from_numpy(x) for x in (z, t, context)]
        for processor in unet.attn_processors.values():
            processor.scale = [0.8]
        embeds = torch.from_numpy(np.stack([nothing, features]))
        eps = unet(*inputs, added_cond_kwargs={"image_embeds": [embeds]}).sample.numpy()
        yield Case("unet_with_image", family, dict(stored("unet"), adapter=weights, z=z, t=t, context=context,
                                                   tokens=tokens, scale=0.8), eps, TOLERANCE,
                   {"the image is left out": network("unet")[0](*inputs).sample.numpy()})


def order_cases(rng):
    """Which transformer block, in the order of execution, each number 1, 3, 5, ... of an adapter's file means."""
    for name, sizes in (("tiny", SIZES["unet"]), ("Stable Diffusion 1.5", SD15)):
        down = sum(sizes["layers_per_block"] for kind in sizes["down_block_types"] if kind.startswith("Cross"))
        up = sum(sizes["layers_per_block"] + 1 for kind in sizes["up_block_types"] if kind.startswith("Cross"))
        order = [*range(down), *range(down + 1, down + 1 + up), down]
        yield Case("adapter_order", name, dict(config=sizes), np.array(order), 0, {
            "the layers' numbers are read in the order of execution; they go down, up, mid": np.arange(len(order))})


def cases():
    rng = np.random.default_rng(22)
    kinds = (unet_cases, vae_cases, text_cases, vision_cases, adapter_cases, order_cases)
    return [case for make in kinds for case in make(rng)]
