"""Twins: a network of diffusers or transformers and ours, with the same random weights, compared module by module.

Not a test file. Both libraries serve as independent oracles; nothing is downloaded.
"""

import math
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from tolerances import NETWORK
from torch import Tensor

from isadca.loading.checkpoints import load_into
from isadca.loading.load import build, find_part
from isadca.networks.ip_adapter import IPAdapter

BY_PRECISION = dict(argnames="dtype, atol", argvalues=list(NETWORK.items()), ids=["fp64", "fp32"])


def shake(net: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, in layers that start at zero or one as well."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = p.data.double() + 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net.double().eval().requires_grad_(False)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_state(shapes: dict, seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights under which activations stay of order one. Biases and the norms' gains are random as well,
    so that a forgotten or swapped one shows."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(*shape, generator=generator)
        if len(shape) == 1:
            state[name] = noise.mul_(0.2).add_(1.0 if name.endswith("weight") else 0.0)
        else:
            state[name] = noise.div_(math.sqrt(math.prod(shape[1:])))
    return state


def shapes_of(model) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def twin(theirs, kind: str, folder, dtype: torch.dtype = torch.float64):
    """Ours, loaded from the files and the config.json that their library writes. Both are in `dtype` afterwards."""
    theirs.load_state_dict(random_state(shapes_of(theirs)))
    theirs.to(dtype).eval().requires_grad_(False).save_pretrained(folder)
    part = find_part(folder, kind, dtype)
    return load_into(build(part), part, dtype)


@contextmanager
def outputs(model):
    """What each submodule returned while the block ran, by name: one flat tensor each."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        def note(_module, _args, output, name=name.removeprefix("text_model.")):
            if isinstance(output, Tensor | tuple):
                seen[name] = _flat(output)
        hooks.append(module.register_forward_hook(note))
    yield seen
    for hook in hooks:
        hook.remove()


def _flat(output) -> Tensor:
    if isinstance(output, Tensor):
        return output.flatten()
    return torch.cat([_flat(part) for part in output if part is not None])


def assert_modules_agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float, ignore=("",)) -> None:
    """In execution order, so that the first name in the message is where two networks part."""
    unmatched = ours.keys() - theirs.keys() - set(ignore)
    assert not unmatched, f"modules without a counterpart: {sorted(unmatched)}"
    for name in ours:
        if name in theirs and name not in ignore:
            assert_near(ours[name], theirs[name], atol, name)


def assert_near(ours: Tensor, theirs: Tensor, atol: float, what: str = "the output") -> None:
    assert ours.shape == theirs.shape, what
    error = (ours - theirs).abs().max().item()
    assert error <= atol, f"{what} differs by {error:.2e}, allowed {atol:.0e}"  # also where error is nan


def assert_order_one(x: Tensor) -> None:
    """Absolute tolerances say something about such outputs only."""
    assert 0.1 < x.std() < 10


# ---- the tiny UNets that several files use ------------------------------------------------------------------

CONTEXT, TOKENS = 24, 7


def diffusers_unet(channels: tuple, attention: tuple, layers: int = 1, heads: int = 4):
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    return UNet2DConditionModel(block_out_channels=channels, down_block_types=down, up_block_types=up,
                                layers_per_block=layers, attention_head_dim=heads, cross_attention_dim=CONTEXT,
                                norm_num_groups=8, sample_size=8)


UNETS = {  # constructor arguments, and the latent's (h, w), oblong on purpose
    "two levels": (dict(channels=(16, 32), attention=(True, False)), (6, 10)),
    "all levels attend": (dict(channels=(16, 24, 40), attention=(True, True, True), heads=2), (8, 4)),
    "as SD1.5": (dict(channels=(16, 32, 48, 48), attention=(True, True, True, False), layers=2), (16, 24)),
}


def unet_inputs(unet, hw: tuple, dtype: torch.dtype, rows: int = 3):
    """z, one time step per row, and the context."""
    z = torch.randn(rows, unet.config.in_channels, *hw, dtype=dtype)
    return z, torch.tensor([981, 1, 500][:rows]), torch.randn(rows, TOKENS, CONTEXT, dtype=dtype)


# ---- IP-Adapter files in the published layout ---------------------------------------------------------------

EMBED, WIDTH = 20, 28  # of the global image embedding, of the patch states


def image_proj_shapes(variant: str, context: int = CONTEXT, embed: int = EMBED, width: int = WIDTH, dim: int = 48,
                      queries: int = 5, heads: int = 2) -> dict[str, tuple]:
    """The published keys of `image_proj`. The resampler is `dim` wide, its heads 64."""
    def affine(name, n):
        return {f"{name}.weight": (n,), f"{name}.bias": (n,)}

    def linear(name, n_out, n_in):
        return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
    if variant == "base":
        return linear("proj", 4 * context, embed) | affine("norm", context)
    if variant == "full-face":
        return linear("proj.0", width, width) | linear("proj.2", context, width) | affine("proj.3", context)
    shapes = {"latents": (1, queries, dim)} | linear("proj_in", dim, width) | linear("proj_out", context, dim)
    shapes |= affine("norm_out", context)
    for layer in (f"layers.{i}" for i in range(4)):
        shapes |= affine(f"{layer}.0.norm1", dim) | affine(f"{layer}.0.norm2", dim) | affine(f"{layer}.1.0", dim)
        shapes |= {f"{layer}.0.to_q.weight": (64 * heads, dim), f"{layer}.0.to_kv.weight": (2 * 64 * heads, dim),
                   f"{layer}.0.to_out.weight": (dim, 64 * heads),
                   f"{layer}.1.1.weight": (4 * dim, dim), f"{layer}.1.3.weight": (dim, 4 * dim)}
    return shapes


def adapter_shapes(variant: str, widths: list[int], context: int = CONTEXT, **sizes) -> dict[str, tuple]:
    """Of a whole file; `widths` of the UNet's cross-attentions in the file's order, which is down, up, mid."""
    shapes = image_proj_shapes(variant, context, **sizes)
    return {f"image_proj.{key}": shape for key, shape in shapes.items()} | {
        f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight": (width, context) for i, width in enumerate(widths) for x in "kv"}


def ours_of(file: dict[str, Tensor], dtype: torch.dtype) -> IPAdapter:
    adapter = IPAdapter({key: tuple(tensor.shape) for key, tensor in file.items()})
    adapter.load_state_dict(file, strict=True)
    return adapter.to(dtype).requires_grad_(False)


def load_adapter_into_diffusers(unet, file: dict[str, Tensor], scale: float = 1.0) -> None:
    dtype = unet.dtype
    nested = {part: {key.removeprefix(f"{part}."): tensor for key, tensor in file.items() if key.startswith(part)}
              for part in ("image_proj", "ip_adapter")}
    unet._load_ip_adapter_weights([nested], low_cpu_mem_usage=False)
    unet.to(dtype).requires_grad_(False)
    for name, processor in unet.attn_processors.items():
        if ".attn2." in name:
            processor.scale = [scale]
