"""The silent numeric mistakes of other Stable Diffusion implementations, one named test each.

None of them stops a program; each makes its pictures a little or entirely wrong. The tests compute what is right by
themselves, in a few lines.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import DEMO
from PIL import Image
from tolerances import TEXT_HALF
from torch import nn
from twins import adapter_shapes, random_state, shapes_of

import isadca
from isadca.attention import attend, attend_reference
from isadca.common.problem import Problem
from isadca.ddim import Schedule, ScheduleConfig
from isadca.loading.config_json import read_config
from isadca.loop import Run
from isadca.networks.clip import ACTIVATIONS, CLIPText
from isadca.networks.ip_adapter import IPAdapter
from isadca.networks.layers import GEGLU, timestep_embedding
from isadca.networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from isadca.networks.tokenizer import Tokenizer
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE
from isadca.reference import Reference, initial_latents

TINY_TEXT = CLIPTextConfig(vocab_size=20, width=16, layers=2, n_heads=2, mlp_width=24, max_tokens=8, projection_dim=6)
END = TINY_TEXT.vocab_size - 1


def on_meta(make, *args):
    with torch.device("meta"):
        return make(*args)


def tiny_text() -> CLIPText:
    text = CLIPText(TINY_TEXT)
    text.load_state_dict(random_state(shapes_of(text)))
    return text.requires_grad_(False)


# ---- convolutions and norms --------------------------------------------------------------------------------

def test_vae_pads_right_and_bottom_the_unet_all_four_sides():
    """A kernel that copies its middle cell tells where it sits: the UNet's on the even cells, the VAE's, whose only
    padding is at the end, on the odd ones. Symmetric padding in the VAE shifts pictures by some pixels."""
    vae = VAE(VAEConfig(channels=(2, 4), layers_per_block=1, norm_groups=1)).encoder.down_blocks[0].downsamplers[0]
    unet = UNet(UNetConfig(channels=(2, 4), attention=(False, False), layers_per_block=1, n_heads=1, context_dim=4,
                           norm_groups=1)).down_blocks[0].downsamplers[0]
    x = torch.randn(1, 2, 6, 8)
    for layer, expected in ((vae, x[:, :, 1::2, 1::2]), (unet, x[:, :, ::2, ::2])):
        nn.init.zeros_(layer.conv.bias)
        layer.conv.weight.data = torch.zeros(2, 2, 3, 3)
        layer.conv.weight.data[:, :, 1, 1] = torch.eye(2)
        assert torch.equal(layer(x), expected)


def test_group_norm_eps_is_1e_6_in_the_vae_and_before_transformers_else_1e_5():
    unet, vae = on_meta(UNet), on_meta(VAE)
    eps = {name: m.eps for name, m in unet.named_modules() if isinstance(m, nn.GroupNorm)}
    before_transformer = {site.name.split(".transformer_blocks")[0] + ".norm" for site in unet.sites}
    assert eps == {name: 1e-6 if name in before_transformer else 1e-5 for name in eps}
    assert (len(eps), len(before_transformer)) == (61, 16)
    assert [m.eps for m in vae.modules() if isinstance(m, nn.GroupNorm)] == [1e-6] * 52


# ---- activations -------------------------------------------------------------------------------------------

XS = [-3.0, -1.0, -0.1, 0.0, 0.5, 2.0]


def test_quick_gelus_constant_is_1_702():
    """Not 1.773, and not the exact GELU."""
    expected = torch.tensor([x / (1 + math.exp(-1.702 * x)) for x in XS], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["quick_gelu"](torch.tensor(XS, dtype=torch.float64)), expected)


def test_geglu_and_openclip_use_the_exact_gelu():
    """x Φ(x) with the error function, not the tanh approximation; GEGLU's first half is the value, not the gate."""
    gelu = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in XS]
    exact = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(ACTIVATIONS["gelu"](torch.tensor(XS, dtype=torch.float64)),
                               torch.tensor(gelu, dtype=torch.float64), **exact)
    geglu = GEGLU(2, 1).double()
    geglu.proj.weight.data, geglu.proj.bias.data = torch.eye(2).double(), torch.zeros(2).double()
    pairs = torch.tensor([(7.0, x) for x in XS], dtype=torch.float64)  # (value, gate)
    torch.testing.assert_close(geglu(pairs)[:, 0], 7 * torch.tensor(gelu, dtype=torch.float64), **exact)


def test_sd15s_text_encoder_is_quick_gelu_and_vit_h_is_gelu():
    assert (CLIPTextConfig().act, CLIPVisionConfig().act) == ("quick_gelu", "gelu")


# ---- text --------------------------------------------------------------------------------------------------

def test_padding_is_the_end_token_and_truncation_keeps_one():
    """SD 1.x was trained with the end token as padding; SD 2.x and OpenAI's own tokenizer pad with 0."""
    tokenizer = Tokenizer.from_folder(DEMO / "tokenizer", 12)
    short, empty, long = tokenizer(["a cat", "", "a cat " * 40]).tolist()
    start, end = tokenizer.start_id, tokenizer.end_id
    words = short.index(end)
    assert short[0] == start and 1 < words < 11 and short[words:] == [end] * (12 - words)
    assert empty == [start] + [end] * 11
    assert long[0] == start and long[-1] == end and end not in long[1:-1] and len(long) == 12


@pytest.mark.parametrize("eos_token_id", [2, END])
def test_pooled_text_is_at_the_first_end_token_whatever_the_config_calls_it(tmp_path, eos_token_id):
    """SD1.5's config.json says eos_token_id 2, which is an ordinary word."""
    raw = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
               max_position_embeddings=8, projection_dim=6, architectures=["CLIPTextModelWithProjection"])
    (tmp_path / "config.json").write_text(json.dumps(raw | {"eos_token_id": eos_token_id}))
    config = read_config(CLIPTextConfig, tmp_path / "config.json")
    assert config == replace(TINY_TEXT, projection_dim=None)  # the file's text_projection tells it
    text = tiny_text()
    ids = torch.tensor([[18, 2, 5, END, END, END, END, END], [18, 7, 2, 9, 3, END, END, END]])
    expected = torch.stack([text(ids)[0, 3], text(ids)[1, 5]]) @ text.text_projection.weight.T
    torch.testing.assert_close(text.embed(ids), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", [attend, attend_reference])
def test_causal_mask_is_finite_in_half_precision(kernel, dtype):
    """A mask of -1e9 overflows fp16 and gives NaN, then a black picture. Here the first token sees itself only, and
    later tokens change nothing before them, also where the scores are large."""
    q, k, v = (torch.randn(1, 2, 9, 8).mul(20).to(dtype) for _ in range(3))
    y = kernel(q, k, v, causal=True)
    assert y.dtype == dtype and torch.isfinite(y).all()
    torch.testing.assert_close(y[:, :, 0], v[:, :, 0])
    k[:, :, 5:], v[:, :, 5:] = 100, -100
    after = kernel(q, k, v, causal=True)
    assert torch.equal(after[:, :, :5], y[:, :, :5]) and not torch.equal(after[:, :, 5:], y[:, :, 5:])


@pytest.mark.parametrize("dtype, atol", TEXT_HALF.items())
def test_text_encoder_is_finite_in_half_precision(dtype, atol):
    text, ids = tiny_text(), torch.tensor([[18, 2, 5] + [END] * 5])
    expected = text(ids)
    torch.testing.assert_close(text.to(dtype)(ids).float(), expected, rtol=0, atol=atol)


def test_vae_is_in_single_precision_under_fp16():
    """It overflows in half precision: a black picture again. Its latents come back in float32."""
    model = isadca.load(DEMO, device="cpu", dtype="fp16")
    dtypes = {name: next(getattr(model, name).parameters()).dtype for name in ("unet", "text", "vae")}
    assert dtypes == {"unet": torch.float16, "text": torch.float16, "vae": torch.float32}
    assert model.encode(torch.zeros(1, 3, 64, 64)).dtype == torch.float32


# ---- attention heads and adapters ----------------------------------------------------------------------------

@pytest.mark.parametrize("heads", [8, 5])
def test_attention_head_dim_is_the_number_of_heads(tmp_path, heads):
    """The name in config.json is a historical mistake: SD1.5's 8 means 8 heads, which are 40, 80 and 160 wide."""
    (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": heads}))
    unet, seen = on_meta(UNet, read_config(UNetConfig, tmp_path / "config.json")), {}

    def widths(q, k, v, site):
        seen[site.name.split(".attentions")[0]] = (q.shape[1], q.shape[3])
        return attend(q, k, v, site)
    unet(torch.randn(1, 4, 8, 8, device="meta"), 1, torch.randn(1, 77, 768, device="meta"), widths)
    channels = {"down_blocks.0": 320, "down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280,
                "up_blocks.1": 1280, "up_blocks.2": 640, "up_blocks.3": 320}
    assert seen == {block: (heads, c // heads) for block, c in channels.items()}


def test_adapter_files_number_the_layers_down_up_mid():
    """The order in which diffusers registers its blocks. In the order of execution the middle block would take 13,
    and of SD1.5's widths only number 19 would not fit. Each pair of weights here holds its number."""
    file = random_state(adapter_shapes("base", [24] * 16))
    for n in range(1, 32, 2):
        file[f"ip_adapter.{n}.to_k_ip.weight"].fill_(n)
        file[f"ip_adapter.{n}.to_v_ip.weight"].fill_(-n)
    adapter = IPAdapter({key: tuple(x.shape) for key, x in file.items()})
    adapter.load_state_dict(file)
    context_dim = adapter.context_dim
    kv = adapter.keys_values(torch.ones(1, 4, context_dim) / context_dim, on_meta(UNet).sites, heads=2)
    numbers = {name.removesuffix(".transformer_blocks.0.attn2"): round(k.mean().item()) for name, (k, _) in kv.items()}
    assert numbers == {
        "down_blocks.0.attentions.0": 1, "down_blocks.0.attentions.1": 3, "down_blocks.1.attentions.0": 5,
        "down_blocks.1.attentions.1": 7, "down_blocks.2.attentions.0": 9, "down_blocks.2.attentions.1": 11,
        "up_blocks.1.attentions.0": 13, "up_blocks.1.attentions.1": 15, "up_blocks.1.attentions.2": 17,
        "up_blocks.2.attentions.0": 19, "up_blocks.2.attentions.1": 21, "up_blocks.2.attentions.2": 23,
        "up_blocks.3.attentions.0": 25, "up_blocks.3.attentions.1": 27, "up_blocks.3.attentions.2": 29,
        "mid_block.attentions.0": 31}
    assert all(torch.equal(v, -k) for k, v in kv.values())


# ---- time --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [0, 1, 981])
def test_time_embedding_is_cosines_first_with_exponent_k_over_160(t):
    """Sines first, or an exponent over 159, are the two other conventions in use."""
    angles = [t * 10000 ** (-k / 160) for k in range(160)]
    expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    embedding = timestep_embedding(torch.tensor([t]), 320)[0]
    torch.testing.assert_close(embedding, expected, rtol=0, atol=2e-4)  # float32 angles, as in training


@pytest.mark.parametrize("steps", [0, -1])
def test_zero_steps_is_a_problem_and_not_an_empty_loop(demo, cat, steps):
    with pytest.raises(Problem, match=f"steps is {steps}"):
        isadca.invert(demo, cat, steps=steps)


def test_first_and_last_ddim_step_use_the_levels_of_training():
    """50 steps go from 981 to 1 and end at the level before t = 0, which is ᾱ[0] for SD1.5 and not 1. Both directions
    ask `alpha_bar`: where one compares with > and the other with >=, their ends differ."""
    betas = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
    levels = [math.prod(1 - b for b in betas[: t + 1]) for t in range(1000)]
    schedule = Schedule()
    grid = schedule.steps(50)
    assert (grid[0], grid[-1], len(grid)) == ((981, 961), (1, -19), 50)
    assert [below.t for below in grid[1:]] == [above.t_prev for above in grid[:-1]]
    assert schedule.alpha_bar(981) == pytest.approx(levels[981], rel=1e-12)
    assert schedule.alpha_bar(grid[-1].t_prev) == pytest.approx(levels[0], rel=1e-12)
    to_one = Schedule(ScheduleConfig(alpha_to_one=True))
    assert [to_one.alpha_bar(t) for t in (-1, 0)] == [1.0, pytest.approx(levels[0], rel=1e-12)]
    assert to_one.steps(999)[-1] == (1, 0)  # the one grid that ends exactly at 0


# ---- seeds and memory --------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [isadca.Method(init="random"), isadca.Method(init="shuffle"),
                                    isadca.Method(diversity=0.3)], ids=["random", "shuffle", "diversity"])
def test_a_seed_means_the_same_start_alone_and_in_a_batch(method):
    """From a CPU generator per picture: independent of the batch, of torch's global state, and of the device."""
    ref = Reference(Image.new("RGB", (8, 8)), torch.randn(3, 4, 6, 6))
    batch = initial_latents(ref, method, (5, 6, 7))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    alone = initial_latents(ref, method, (6,))
    assert torch.equal(batch[1:2], alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(batch[0], batch[2])


def test_a_seeds_noise_is_the_cpu_generators():
    ref = Reference(Image.new("RGB", (8, 8)), torch.zeros(3, 4, 6, 6))
    z = initial_latents(ref, isadca.Method(init="random"), (5,))
    expected = torch.randn(1, 4, 6, 6, generator=torch.Generator("cpu").manual_seed(5), dtype=torch.float64)
    assert torch.equal(z, expected.float())


def test_no_graph_is_kept_of_a_run(demo, cat):
    """A graph through 50 steps is many times the model. The weights ask for none, so nothing has to be switched off."""
    networks = (demo.unet, demo.vae, demo.text, demo.vision, demo.ip_adapter)
    assert not any(p.requires_grad for network in networks for p in network.parameters())
    ref = isadca.invert(demo, cat, steps=1)
    [z] = isadca.sample(demo, ref, [Run("a cat", seeds=(0,))])
    assert not ref.chain.requires_grad and not z.requires_grad and z.grad_fn is None


def test_rows_at_once_bounds_the_batch_of_every_call(demo, cat):
    """Source and target rows, guidance halves and branches multiply; memory must not follow the number of seeds."""
    ref, rows = isadca.invert(demo, cat, steps=1), []

    def counting(q, k, v, site):
        rows.append(len(q))
        return attend(q, k, v, site)
    method = isadca.Method(init="random")
    options = dict(replayed=list(isadca.replay(demo, ref)), kernel=counting)
    [split] = isadca.sample(demo, ref, [Run("a cat", method, seeds=(0, 1, 2))], rows_at_once=4, **options)
    assert max(rows) <= 4
    [whole] = isadca.sample(demo, ref, [Run("a cat", method, seeds=(0, 1, 2))], **options)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-4)
