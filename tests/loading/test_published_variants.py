"""Good files that people have and that differ from the published ones load; what is decided by no file is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from keyfiles import listing, told, write_sparse
from safetensors.torch import load_file, save_file

import isadca
from isadca.app import inspect
from isadca.loading import load as loading
from isadca.loading.config_json import read_config, read_schedule
from isadca.loading.known_encoders import KNOWN_ENCODERS
from isadca.networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig
from isadca.networks.tokenizer import Tokenizer

LDM, UNET, TEXT = (listing(name) for name in ("sd15_single_file_ldm_emaonly", "sd15_diffusers_unet",
                                             "sd15_diffusers_text_encoder"))
VIT_H, VIT_L = listing("image_encoder_vit_h"), listing("image_encoder_vit_l14_lambda")
DEMO_UNET = json.loads((DEMO / "unet" / "config.json").read_text())


def own(folder: Path, *real: str) -> Path:
    """The demo as links; the folders in `real` are copies."""
    folder.mkdir()
    for entry in DEMO.iterdir():
        if entry.name in real:
            shutil.copytree(entry, folder / entry.name, copy_function=shutil.copyfile)
        else:
            (folder / entry.name).symlink_to(entry)
    return folder


def with_json(folder: Path, name: str, **changes) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def same_weights(model: isadca.Model, kind: str) -> bool:
    file, = [path for path in (DEMO / loading.FOLDERS[kind]).glob("*.safetensors")]
    theirs = load_file(file)
    return all(torch.equal(t, theirs.get(key, theirs.get(key.removeprefix("text_model."))).float())
               for key, t in getattr(model, kind).state_dict().items())


# --- what loads -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("listed", [True, False], ids=["pairs as lists", "pairs as strings"])
def test_tokenizer_json_alone(tmp_path, listed):
    """What transformers 5 saves: the same ids as vocab.json and merges.txt."""
    both = Tokenizer.from_folder(DEMO / "tokenizer", 32)
    saved = json.loads(both._bpe.to_str())
    if not listed:
        saved["model"]["merges"] = [" ".join(pair) for pair in saved["model"]["merges"]]
    folder = own(tmp_path / "model", "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(saved))
    model = isadca.load(folder, device="cpu", dtype="fp32")
    texts = ["a lemon, soft", "", "A Cat's tail 12 <|endoftext|>"]
    assert torch.equal(model.tokenizer(texts), both(texts))


def test_vae_keys_that_were_converted_halfway(tmp_path):
    """first_stage_model.*.mid.attn_1.to_q, ...: diffusers issue 4790."""
    names = [(".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")]
    tensors = dict(LDM)
    for key in [key for key in LDM if ".mid.attn_1." in key]:
        for old, new in names:
            tensors[key.replace(old, new) if old in key else key] = tensors.pop(key) if old in key else tensors[key]
            key = key.replace(old, new)
    assert any(".mid.attn_1.to_out.0." in key for key in tensors)
    parts = inspect.parts_of(write_sparse(tmp_path / "x.safetensors", tensors))
    assert [part.kind for part in parts] == ["unet", "vae", "text"]


def test_a_model_without_vae_and_a_vae_apart(tmp_path):
    model = isadca.load(own(tmp_path / "model"), vae=DEMO / "vae", device="cpu")
    assert model.files["vae"].parent == DEMO / "vae"
    bare = write_sparse(tmp_path / "x.safetensors", {k: v for k, v in LDM.items() if "first_stage" not in k})
    vae = DEMO / "vae" / "diffusion_pytorch_model.safetensors"
    assert set(loading.read_parts(loading.locate(bare, vae=vae), torch.float32)) == {"unet", "vae", "text"}


def sharded(folder: Path, stem: str, n: int = 3) -> None:
    """A network's file as several and an index.json, as save_pretrained(max_shard_size=...) writes them."""
    file, = folder.glob("*.safetensors")
    tensors, where = load_file(file), {}
    file.unlink()
    for i in range(n):
        name = f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors"
        own = dict(list(tensors.items())[i::n])
        save_file(own, folder / name)
        where |= dict.fromkeys(own, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_network_in_several_files(tmp_path):
    folder = own(tmp_path / "model", "unet", "text_encoder")
    sharded(folder / "unet", "diffusion_pytorch_model")
    sharded(folder / "text_encoder", "model")
    model = isadca.load(folder, device="cpu", dtype="fp32")
    assert same_weights(model, "unet") and same_weights(model, "text")
    assert model.files["unet"].name.endswith("index.json") and len([f for f in model.files if "-of-" in f]) == 6
    assert [part.kind for part in inspect.parts_of(folder)][:3] == ["unet", "vae", "text"]


@pytest.mark.parametrize("change, words", [
    ({"weight_map": None}, "no weight_map"), ({"weight_map": {"a": "../x"}}, "no weight_map"),
    ({"weight_map": {"a": 7}}, "no weight_map")])
def test_an_index_that_lists_no_files_beside_it(tmp_path, change, words):
    folder = own(tmp_path / "model", "unet")
    sharded(folder / "unet", "diffusion_pytorch_model")
    with_json(folder, "unet/diffusion_pytorch_model.safetensors.index.json", **change)
    told(lambda: isadca.load(folder), folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", words)


def test_another_file_beside_the_network(tmp_path):
    """A shorter name than the published one does not win."""
    folder = own(tmp_path / "model", "unet")
    save_file({"x": torch.ones(1)}, folder / "unet" / "a.safetensors")
    assert isadca.load(folder, device="cpu").files["unet"].name == "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("change", [
    {"upcast_attention": True}, {"act_fn": "swish"}, {"attention_head_dim": [4, 4, 4]},
    {"only_cross_attention": [False] * 3}, {"transformer_layers_per_block": [1, 1, 1]},
    {"cross_attention_dim": [128] * 3}, {"resnet_out_scale_factor": 1.0}], ids=str)
def test_settings_that_mean_plain_sd15(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(DEMO_UNET | change))
    assert read_config(UNetConfig, tmp_path / "config.json") == read_config(UNetConfig, DEMO / "unet" / "config.json")


@pytest.mark.parametrize("says", ["CLIPTextModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("holds", [True, False])
def test_a_text_encoder_is_projected_where_its_file_is(tmp_path, says, holds):
    """Whatever its config.json says."""
    folder = own(tmp_path / "model", "text_encoder")
    with_json(folder, "text_encoder/config.json", architectures=[says])
    if holds:
        file = folder / "text_encoder" / "model.safetensors"
        save_file(load_file(file) | {"text_projection.weight": torch.zeros(128, 128)}, file)
    assert isadca.load(folder, device="cpu").text.config.projection_dim == (128 if holds else None)


@pytest.mark.parametrize("tensors", [LDM, UNET], ids=["single file", "unet"])
def test_the_keys_of_a_merged_lora_are_left_out(tmp_path, tensors):
    lora = {"lora_unet_mid_block_proj_in.alpha": ("F16", ()), "lora_te_x.lora_down.weight": ("F16", (4, 8))}
    assert inspect.parts_of(write_sparse(tmp_path / "x.safetensors", tensors | lora))


def test_missing_keys_of_a_clip_config_are_the_classes_defaults(tmp_path):
    """transformers leaves out what equals its own defaults: CLIPTextConfig's and CLIPVisionConfig's, ViT-B/32."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"projection_dim": 512, "text_config": {}, "vision_config": {}}))
    assert read_config(CLIPTextConfig, path) == CLIPTextConfig(width=512, n_heads=8, mlp_width=2048)
    assert read_config(CLIPVisionConfig, path) == CLIPVisionConfig(768, 12, 12, 3072, 224, 32, 512, "quick_gelu")
    path.write_text(json.dumps({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                                "intermediate_size": 4096, "patch_size": 14, "projection_dim": 768}))
    assert read_config(CLIPVisionConfig, path) == KNOWN_ENCODERS[1024]


# --- what is refused --------------------------------------------------------------------------------------------------

def test_an_image_encoder_that_its_shapes_do_not_decide(tmp_path):
    known = inspect.parts_of(write_sparse(tmp_path / "l.safetensors", VIT_L))
    assert [part.kind for part in known] == ["vision"]
    other = {key: (dtype, tuple(768 if n == 1280 else n for n in shape)) for key, (dtype, shape) in VIT_H.items()}
    path = write_sparse(tmp_path / "b.safetensors", other)
    told(lambda: inspect.parts_of(path), path, "768 wide without its config.json", "; ")


@pytest.mark.parametrize("line", ["    parameterization: v", 'parameterization: "v"', "  parameterization: 'v' # 2.1"])
def test_a_yaml_that_says_v(tmp_path, line):
    path = write_sparse(tmp_path / "x.safetensors", LDM)
    (tmp_path / "x.yaml").write_text(f"model:\n  params:\n{line}\n")
    told(lambda: isadca.load(path), path, "predicts v", "x.yaml", "; use a plain")
    (tmp_path / "x.yaml").write_text('      parameterization: "eps"\n      v: 1\n')
    assert len(inspect.parts_of(path)) == 3


@pytest.mark.parametrize("key", ["v_pred", "ztsnr"])
def test_a_key_that_says_v(tmp_path, key):
    path = write_sparse(tmp_path / "x.safetensors", LDM | {key: ("F16", (0,))})
    told(lambda: isadca.load(path), path, "predicts v", f"the key {key}", "; use a plain")


@pytest.mark.parametrize("tensors", [LDM, UNET], ids=["single file", "unet"])
@pytest.mark.parametrize("key, value", [
    ("modelspec.prediction_type", "v"), ("modelspec.prediction_type", "V_prediction"),
    ("ss_v_parameterization", "True"), ("ss_zero_terminal_snr", "True")])
def test_metadata_that_says_v(tmp_path, tensors, key, value):
    path = tmp_path / "x.safetensors"
    write_sparse(path, tensors, {"format": "pt", key: value})
    told(lambda: inspect.parts_of(path), path, "predicts v", f"the metadata {key}: {value}", "; use a plain")
    write_sparse(path, tensors, {"format": "pt", key: "epsilon" if "prediction" in key else "False"})
    assert inspect.parts_of(path)


def test_shards_without_an_index(tmp_path):
    """They may be all there, or not: nothing says."""
    folder = own(tmp_path / "model", "unet")
    sharded(folder / "unet", "diffusion_pytorch_model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    told(lambda: isadca.load(folder), folder / "unet", "is one file of several", "; get their .safetensors.index.json")


@pytest.mark.parametrize("change", [
    {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}, {"thresholding": True}, {"beta_end": 12},
    {"beta_start": 0.9999999, "beta_end": 0.9999999}, {"num_train_timesteps": 10**30}, {"beta_end": 1e308}], ids=str)
def test_schedules_that_are_not_computed(tmp_path, change):
    path = tmp_path / "scheduler_config.json"
    path.write_text((DEMO / "scheduler" / "scheduler_config.json").read_text())
    with_json(tmp_path, path.name, **change)
    told(lambda: read_schedule(path), path, ";")


@pytest.mark.parametrize("change", [
    {"resnet_skip_time_act": True}, {"timestep_post_act": "silu"}, {"resnet_out_scale_factor": 1.41},
    {"layers_per_block": 10**9}, {"norm_num_groups": 10**30}, {"cross_attention_dim": 10**30},
    {"block_out_channels": [64] * 10**4}, {"mid_block_type": "UNetMidBlock2DSimple"}], ids=lambda c: str(c)[:40])
def test_unets_that_are_not_computed(tmp_path, change):
    folder = own(tmp_path / "model", "unet")
    with_json(folder, "unet/config.json", **change)
    with pytest.raises(isadca.loading.load.Problem) as caught:
        isadca.load(folder, device="cpu")
    assert len(str(caught.value)) < 300 + 2 * len(str(folder))


@pytest.mark.parametrize("name, key", [("text_encoder", "num_hidden_layers"), ("image_encoder", "num_hidden_layers"),
                                       ("vae", "layers_per_block")])
@pytest.mark.parametrize("size", [10**6, 10**9, 10**30])
def test_layers_are_counted_before_they_are_built(tmp_path, name, key, size):
    folder = own(tmp_path / "model", name)
    with_json(folder, f"{name}/config.json", **{key: size})
    with pytest.raises(isadca.loading.load.Problem, match=r": \w+ of \d+ layers|: layers(_per_block)? is 1"):
        isadca.load(folder, device="cpu")


def test_a_resamplers_layers_are_counted_too(tmp_path):
    tensors = listing("ip-adapter-plus_sd15") | {"image_proj.layers.1000000000.0.norm1.weight": ("F16", (768,))}
    path = write_sparse(tmp_path / "x.safetensors", tensors)
    told(lambda: inspect.parts_of(path), path, "no published layout")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, " " * 2**24 + "{}"],
                         ids=["brackets", "deep", "long"])
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_json_without_bound(tmp_path, name, text):
    folder = own(tmp_path / "model", name.split("/")[0])
    (folder / name).write_text(text)
    told(lambda: isadca.load(folder), folder / name, "not a readable config", "; copy it again")


@pytest.mark.parametrize("flag", ["weights", "ip_adapter", "vae", "image_encoder"])
def test_a_pipe_is_no_weights(tmp_path, flag):
    os.mkfifo(tmp_path / "pipe.safetensors")
    told(lambda: isadca.load(**{"weights": DEMO, flag: tmp_path / "pipe.safetensors"}), tmp_path / "pipe.safetensors",
         "no regular file")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_damage_that_a_cpus_attention_hides(tmp_path, value):
    """One NaN in K' and the kernel drops the score: a clean picture, without the image prompt."""
    tensors = load_file(DEMO / "ip-adapter_demo.safetensors")
    tensors["ip_adapter.3.to_k_ip.weight"][5, 7] = value
    save_file(tensors, tmp_path / "x.safetensors")
    told(lambda: isadca.load(DEMO, ip_adapter=tmp_path / "x.safetensors", device="cpu"), tmp_path / "x.safetensors",
         "inf or NaN in ip_adapter.3.to_k_ip.weight", "; download it again")


@pytest.mark.parametrize("name, content", [("scheduler/scheduler_config.json", "{"), ("tokenizer/vocab.json", "{}")])
def test_inspect_reads_the_scheduler_and_the_vocabulary(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)  # a message is cut where paths are long
    folder = own(Path("model"), name.split("/")[0])
    (folder / name).write_text(content)
    told(lambda: inspect.parts_of(folder), folder / name if "scheduler" in name else f"{folder / name}, "
         f"{folder / 'tokenizer' / 'merges.txt'}", ";")


def test_inspect_of_a_model_without_its_vocabulary(tmp_path):
    """CLIP's own would be taken, which does not fit the demo: what load says, inspect says."""
    folder = own(tmp_path / "model")
    (folder / "tokenizer").unlink()
    for read in (isadca.load, inspect.parts_of):
        told(lambda: read(folder), DEMO.parent / "tokenizer", "a vocabulary of 49408 tokens")
