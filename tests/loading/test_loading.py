"""From a file in every layout to a network: the right tensors in the right places. Small networks, real data.

What load() makes of a whole model is in test_load.py.
"""

import struct
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from keyfiles import ldm_pairs
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig as TheirTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig as TheirVisionConfig,
    CLIPVisionModelWithProjection,
)

import isadca
from isadca.loading import checkpoints, load as loading
from isadca.networks.clip import CLIPText
from isadca.networks.sizes import CLIPTextConfig, UNetConfig, VAEConfig
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

# SD1.5's levels, layers and vocabulary, much narrower
NARROW = {UNetConfig: UNetConfig(channels=(8, 16, 32, 32), n_heads=4, context_dim=24, norm_groups=8, sample_size=8),
          VAEConfig: VAEConfig(channels=(8, 16, 32, 32), norm_groups=8),
          CLIPTextConfig: CLIPTextConfig(width=24, n_heads=4, mlp_width=48)}
MAKE = {"unet": lambda: UNet(NARROW[UNetConfig]), "vae": lambda: VAE(NARROW[VAEConfig]),
        "text": lambda: CLIPText(NARROW[CLIPTextConfig])}


def random_network(kind: str) -> torch.nn.Module:
    """All weights random, the norms' too, so that no two tensors are alike."""
    network = MAKE[kind]().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter == 1))
    return network


@pytest.fixture(scope="module")
def originals():
    torch.manual_seed(1)
    return {kind: random_network(kind) for kind in MAKE}


def ldm_tensors(network: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """The network under LDM's names, by the independent map; LDM's VAE attends with 1 x 1 convolutions."""
    state, tensors = network.state_dict(), {}
    for ldm, ours in ldm_pairs(kind).items():
        if ours.endswith("position_ids"):
            tensors[ldm] = torch.arange(77)[None]
        else:
            convolves = ".mid.attn_1." in ldm and state[ours].ndim == 2
            tensors[ldm] = state[ours][:, :, None, None] if convolves else state[ours]
    return {ldm: tensor.contiguous() for ldm, tensor in tensors.items()}


@pytest.fixture(scope="module")
def single_file(originals, tmp_path_factory):
    path = tmp_path_factory.mktemp("ldm") / "narrow.safetensors"
    tensors = {key: t for kind, network in originals.items() for key, t in ldm_tensors(network, kind).items()}
    save_file(tensors | {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}, path)
    return path


def assert_same(network: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == tensors.keys()
    assert not [key for key in state if not torch.equal(state[key], tensors[key])]


def run(network: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    if isinstance(network, UNet):
        return network(z, 500, torch.randn(2, 5, network.config.context_dim, generator=generator))
    if isinstance(network, VAE):
        return network.encode(network.decode(z))
    return network(torch.randint(0, 49408, (2, 77), generator=generator))


def loaded(path: Path, kind: str, dtype=torch.float32) -> torch.nn.Module:
    with torch.device("meta"):
        network = MAKE[kind]()
    return checkpoints.load_into(network, loading.find_part(path, kind, dtype), dtype)


@pytest.mark.parametrize("kind", MAKE)
def test_single_file_gives_the_network_that_was_saved(originals, single_file, kind):
    network = loaded(single_file, kind)
    assert_same(network, originals[kind].state_dict())
    torch.testing.assert_close(run(network), run(originals[kind]), atol=1e-5, rtol=1e-5)


def test_single_file_loads_as_a_whole(originals, single_file, monkeypatch):
    """load() of one file: SD1.5's sizes (here narrow ones), CLIP's own vocabulary, no adapter beside it."""
    monkeypatch.setattr(loading, "read_config", lambda cls, path: NARROW.get(cls, cls()))
    model = isadca.load(single_file, device="cpu", dtype="fp32")
    assert model.files == {kind: single_file for kind in MAKE} and model.ip_adapter is model.vision is None
    for kind, network in originals.items():
        assert_same(getattr(model, kind), network.state_dict())
    ids = model.tokenizer(["a photo of a cat"])
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    torch.testing.assert_close(model.context(["a photo of a cat"]), originals["text"](ids), atol=1e-5, rtol=1e-5)


def old_vae_name(key: str) -> str:
    for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


@pytest.mark.parametrize("kind, variant", [
    ("vae", lambda state: {old_vae_name(key): t for key, t in state.items()}),
    ("vae", lambda state: {"vae." + key: t for key, t in state.items()}),
    ("text", lambda state: {key.removeprefix("text_model."): t for key, t in state.items()}),
    ("text", lambda state: state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    ("text", lambda state: state | {"text_model.embeddings.position_ids": torch.arange(77.0)[None].half()})])
def test_other_names_give_the_same_network(originals, tmp_path, kind, variant):
    state = originals[kind].state_dict()
    save_file(variant(dict(state)), tmp_path / "model.safetensors")
    assert_same(loaded(tmp_path / "model.safetensors", kind), state)


@pytest.mark.parametrize("residue", range(8))
def test_data_that_is_not_aligned(originals, tmp_path, residue):
    """Old writers did not pad the header; tensors may begin at any byte."""
    save_file(originals["unet"].state_dict(), tmp_path / "even.safetensors")
    raw = (tmp_path / "even.safetensors").read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    (tmp_path / "odd.safetensors").write_bytes(
        struct.pack("<Q", length + residue) + raw[8: 8 + length] + b" " * residue + raw[8 + length:])
    network = loaded(tmp_path / "odd.safetensors", "unet")
    assert_same(network, originals["unet"].state_dict())
    torch.testing.assert_close(run(network), run(originals["unet"]), atol=1e-5, rtol=1e-5)


TEXT = dict(vocab_size=99, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            projection_dim=20, bos_token_id=97, eos_token_id=98)
THEIRS = {
    "unet": lambda: UNet2DConditionModel(block_out_channels=(16, 32), down_block_types=(
        "CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
        attention_head_dim=4, cross_attention_dim=24, sample_size=8),
    "vae": lambda: AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                                 up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=4),
    "text": lambda: CLIPTextModel(TheirTextConfig(**TEXT)),
    "text, projected": lambda: CLIPTextModelWithProjection(TheirTextConfig(**TEXT)),
    "vision": lambda: CLIPVisionModelWithProjection(TheirVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        projection_dim=20, hidden_act="gelu"))}


def tensors_of(network: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By name; transformers 5 leaves out text_model. in some classes, transformers 4 has position_ids."""
    return {key.removeprefix("text_model."): tensor.to(dtype) for key, tensor in network.state_dict().items()
            if not key.endswith("position_ids")}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("dtype, marked", [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
def test_what_diffusers_and_transformers_save_is_what_we_load(tmp_path, name, dtype, marked):
    """Their save_pretrained, in both precisions in one folder: config.json, file names, keys and values. bfloat16
    is made from the half-precision file, which is half the reading."""
    theirs = THEIRS[name]()
    theirs.save_pretrained(tmp_path)
    theirs.half().save_pretrained(tmp_path, variant="fp16")
    part = loading.find_part(tmp_path, name.split(",")[0], dtype)
    assert (".fp16." in part.path.name) == marked
    network = checkpoints.load_into(loading.build(part), part, dtype)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {dtype}
    ours, expected = tensors_of(network, dtype), tensors_of(theirs, dtype)
    if dtype == torch.float32:  # `theirs` has been rounded in between
        ours, expected = tensors_of(network, torch.float16), tensors_of(theirs, torch.float16)
    assert ours.keys() == expected.keys()
    assert not [key for key in ours if not torch.equal(ours[key], expected[key])]
