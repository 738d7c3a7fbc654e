"""Files that cannot be used: each gets ONE line that names the path, says what it is, and what to do."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from hypothesis import given, settings, strategies as st
from keyfiles import Listing, listing, renamed, told, write_sparse
from safetensors.torch import save

import isadca
from isadca.app import inspect
from isadca.loading import checkpoints, load as loading
from isadca.networks.sizes import CLIPTextConfig

UNET, TEXT = listing("sd15_diffusers_unet"), listing("sd15_diffusers_text_encoder")
LDM = listing("sd15_single_file_ldm_emaonly")
ADAPTERS = {name: listing(f"ip-adapter{name}") for name in ("_sd15", "_sd15_vit-G", "-plus_sd15", "-full-face_sd15")}
VIT_H, BIG_G = listing("image_encoder_vit_h"), listing("image_encoder_vit_bigG")


def widened(tensors: Listing, context: int) -> Listing:
    """Cross-attention that reads `context` wide text instead of 768."""
    return {key: (dtype, (shape[0], context) if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else shape)
            for key, (dtype, shape) in tensors.items()}


def no_text(tensors: Listing) -> Listing:
    return {key: v for key, v in tensors.items() if not key.startswith("cond_stage_model.")}


# --- files that are not safetensors ---------------------------------------------------------------------------------

WHOLE = save({"ip_adapter.1.to_k_ip.weight": torch.zeros(64, 8)})


@pytest.mark.parametrize("content, words", [
    (b"", ("is empty", "download it again")),
    (b"GGUF\3\0\0\0" + bytes(64), ("a GGUF file", "get the .safetensors version")),
    (b"These are not the weights.\n", ("not a whole safetensors file", "download it again")),
    (b"version https://git-lfs.github.com/spec/v1\n", ("a Git LFS pointer", "run git lfs pull")),
    (b"<!DOCTYPE html>\n<html>Sign in</html>", ("not a whole safetensors file", "download it again")),
    (pickle.dumps({"a": 1}, protocol=2), ("a pickle", "can run code", "get the .safetensors version"))])
def test_file_of_another_format(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    told(lambda: inspect.parts_of(path), path, *words)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_the_wrong_name(tmp_path, zipped):
    """A .bin or .ckpt that was renamed is refused, and not opened."""
    path = tmp_path / "model.safetensors"
    torch.save({"conv_in.weight": torch.zeros(4)}, path, _use_new_zipfile_serialization=zipped)
    told(lambda: inspect.parts_of(path), path, "a pickle", "can run code", "get the .safetensors version")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40, len(WHOLE) // 2, len(WHOLE) - 1])
def test_truncated_file(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE[:length])
    told(lambda: checkpoints.recognise(path), path, "not a whole safetensors file", "download it again")


def test_truncated_file_of_true_size(tmp_path):
    path = write_sparse(tmp_path / "v1-5.safetensors", LDM)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    told(lambda: isadca.load(path), path, "not a whole safetensors file", "download it again")


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=64) | st.text(max_size=40).map(lambda s: struct.pack("<Q", len(s.encode())) + s.encode()))
def test_any_bytes_are_a_problem_and_never_a_crash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(content)
    told(lambda: checkpoints.recognise(path), path, ";")


# --- safetensors of something else ----------------------------------------------------------------------------------

HALF_LORA = {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ("F16", (4, 320, 1, 1)),
             "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ("F16", ())}
CONTROLNET = {"input_hint_block.0.weight": ("F32", (16, 3, 3, 3)), "input_blocks.0.0.weight": ("F32", (320, 4, 3, 3)),
              "middle_block_out.0.weight": ("F32", (1280, 1280, 1, 1))}
ENCODER_HALF = {key: v for key, v in UNET.items() if key.startswith(("conv_in", "down_blocks", "mid_block"))}
TRAINING = {"image_proj_model.proj.weight": ("F32", (3072, 1024)), "unet.conv_in.weight": ("F32", (320, 4, 3, 3))}
OPEN_CLIP = {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": ("F32", (1024,))}
XL_CLIP = {"conditioner.embedders.1.model.ln_final.weight": ("F32", (1280,))}

STRANGERS = {
    "SD 2.x single file": (no_text(widened(LDM, 1024)) | OPEN_CLIP, ("an SD 2.x model", "Stable Diffusion 1.x")),
    "SD 2.x UNet": (widened(UNET, 1024), ("SD 2.x", "1024 wide", "SD 1.x has 768")),
    "SDXL single file": (no_text(widened(LDM, 2048)) | XL_CLIP, ("an SDXL model", "Stable Diffusion 1.x")),
    "SDXL UNet": (widened(UNET, 2048) | {"add_embedding.linear_1.weight": ("F16", (1280, 2816))},
                  ("an SDXL model", "Stable Diffusion 1.x")),
    "XL-like UNet": (widened(UNET, 2048), ("SD XL", "2048 wide", "SD 1.x has 768")),
    "inpainting UNet": (UNET | {"conv_in.weight": ("F32", (320, 9, 3, 3))},
                        ("9 input channels", "an inpainting or editing model", "get the plain SD 1.x one")),
    "inpainting single file": (LDM | {"model.diffusion_model.input_blocks.0.0.weight": ("F32", (320, 9, 3, 3))},
                               ("conv_in.weight (from model.diffusion_model.input_blocks.0.0.weight)",
                                "9 input channels", "get the plain SD 1.x one")),
    "editing UNet": (UNET | {"conv_in.weight": ("F32", (320, 8, 3, 3))}, ("8 input channels", "get the plain")),
    "FaceID adapter": (listing("ip-adapter_sd15") | {"ip_adapter.0.to_q_lora.down.weight": ("F16", (128, 320))},
                       ("of no published layout", "isadca reads ip-adapter_sd15")),
    "LoRA, kohya": (HALF_LORA, ("a LoRA", "merge it into a checkpoint first")),
    "LoRA, diffusers": (renamed(HALF_LORA, "lora_unet_", "unet."), ("a LoRA", "merge it into a checkpoint first")),
    "IP-Adapter in training": (TRAINING | {"adapter_modules.1.to_k_ip.weight": ("F32", (320, 768))},
                               ("an IP-Adapter training checkpoint", "convert it to the published layout")),
    "IP-Adapter in training, shared weights dropped": (
        TRAINING | {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight":
                    ("F32", (1280, 768))}, ("an IP-Adapter training checkpoint", "convert it")),
    "anything else": ({"bert.pooler.dense.bias": ("F32", (768,))},
                      ("none of the layouts", "1 tensors, e.g. bert.pooler.dense.bias", "README")),
    "a line break in a name": ({"bert\n\u2028x": ("F32", (768,))}, ("none of the layouts", "e.g. bert  x)")),
    "nothing": ({}, ("none of the layouts", "0 tensors", "README")),
    "CLIP, OpenAI's names": ({"visual.conv1.weight": ("F32", (1024, 3, 14, 14))},
                             ("in OpenAI's or OpenCLIP's own layout", "get the one for transformers")),
}
CONTROLNETS = {
    "LDM": renamed(CONTROLNET, "", "control_model."), "LDM, bare": CONTROLNET,
    "diffusers": ENCODER_HALF | {"controlnet_mid_block.weight": ("F32", (1280, 1280, 1, 1))}}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_file_of_another_model(tmp_path, monkeypatch, stranger):
    tensors, words = STRANGERS[stranger]
    monkeypatch.chdir(tmp_path)  # a message is cut where paths are long
    path = write_sparse(Path("model.safetensors"), tensors)
    told(lambda: inspect.parts_of(path), path, *words)


@pytest.mark.parametrize("layout", CONTROLNETS)
def test_a_controlnet_is_no_model(tmp_path, layout):
    path = write_sparse(tmp_path / "x.safetensors", CONTROLNETS[layout])
    told(lambda: isadca.load(path), path, "a ControlNet", "base model with --weights")


# --- IP-Adapters that do not belong to the model --------------------------------------------------------------------

@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """SD1.5's UNet and text encoder at full size, on meta."""
    folder = tmp_path_factory.mktemp("sd15")
    parts = [part for name, tensors in [("unet", UNET), ("text", TEXT)]
             for part in checkpoints.recognise(write_sparse(folder / f"{name}.safetensors", tensors)).values()]
    return {part.kind: part for part in parts}, {part.kind: loading.build(part) for part in parts}


def fit(sd15, folder: Path, adapter: Listing, encoder: Listing | None = None) -> None:
    """Do an adapter and an image encoder belong to SD1.5, and to each other?"""
    found, networks = dict(sd15[0]), dict(sd15[1])
    for kind, tensors in [("ip_adapter", adapter), ("vision", encoder)]:
        if tensors:
            found |= checkpoints.recognise(write_sparse(folder / f"{kind}.safetensors", tensors))
            networks[kind] = loading.build(found[kind])
    loading._check_fit(networks, found)


@pytest.mark.parametrize("name, encoder", [("_sd15", VIT_H), ("-plus_sd15", VIT_H), ("-full-face_sd15", VIT_H),
                                           ("_sd15_vit-G", BIG_G)])
def test_published_pairs_fit(sd15, tmp_path, name, encoder):
    fit(sd15, tmp_path, ADAPTERS[name], encoder)


@pytest.mark.parametrize("name, encoder, words", [
    ("_sd15", BIG_G, ("reads 1024-wide", "gives 1280", "ViT-H, h94's models/image_encoder")),
    ("_sd15_vit-G", VIT_H, ("reads 1280-wide", "gives 1024", "ViT-bigG, h94's sdxl_models/image_encoder")),
    ("-plus_sd15", BIG_G, ("reads 1280-wide", "gives 1664", "ViT-H, h94's models/image_encoder")),
    ("-full-face_sd15", BIG_G, ("reads 1280-wide", "gives 1664", "ViT-H, h94's models/image_encoder"))])
def test_wrong_image_encoder_says_which_is_needed(sd15, tmp_path, name, encoder, words):
    told(lambda: fit(sd15, tmp_path, ADAPTERS[name], encoder), tmp_path / "ip_adapter.safetensors",
         "--image-encoder", *words)


def test_sdxl_adapter(sd15, tmp_path):
    xl = {key: (dtype, tuple({768: 2048, 3072: 4 * 2048}.get(n, n) for n in shape))
          for key, (dtype, shape) in ADAPTERS["_sd15"].items()}
    told(lambda: fit(sd15, tmp_path, xl), tmp_path / "ip_adapter.safetensors", "made for another UNet", "(320, 2048)",
         "(320, 768)", "SD 1.5 takes the ip-adapter*_sd15 files")


def test_adapter_without_one_layer(sd15, tmp_path):
    fewer = {key: v for key, v in ADAPTERS["_sd15"].items() if ".31." not in key}
    told(lambda: fit(sd15, tmp_path, fewer), tmp_path / "ip_adapter.safetensors", "made for another UNet",
         "ip_adapter.31.to_k_ip")


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_without_any_one_tensor_is_explained(tmp_path, name):
    """Its sizes are read off its tensors; no missing one may end in a traceback."""
    for key in ADAPTERS[name]:
        fewer = {k: v for k, v in ADAPTERS[name].items() if k != key}
        path = write_sparse(tmp_path / "x.safetensors", fewer)
        text = told(lambda: inspect.parts_of(path), path)
        assert f"1 missing: {key}." in text or "no published layout" in text or "none of the layouts" in text


def test_text_encoder_of_another_model(sd15, tmp_path):
    found, networks = dict(sd15[0]), dict(sd15[1])
    wide = {key: (dtype, tuple(1024 if n == 768 else n for n in shape)) for key, (dtype, shape) in TEXT.items()}
    found |= checkpoints.recognise(write_sparse(tmp_path / "model.safetensors", wide))
    (tmp_path / "config.json").write_text(json.dumps(dict(hidden_size=1024, num_attention_heads=16)))
    networks["text"] = loading.build(found["text"])
    told(lambda: loading._check_fit(networks, found), tmp_path / "model.safetensors", "width 1024", "768",
         "different models")


# --- folders --------------------------------------------------------------------------------------------------------

def demo_without(folder: Path, *names: str) -> Path:
    """A copy of the demo checkpoint, made of links, that lacks some folders."""
    folder.mkdir()
    for entry in DEMO.iterdir():
        if entry.name not in names:
            (folder / entry.name).symlink_to(entry)
    return folder


def test_path_that_is_not_there(tmp_path):
    path = tmp_path / "nothing"
    told(lambda: isadca.load(path), path, "no such file or folder", "--weights takes")
    told(lambda: isadca.load(DEMO, ip_adapter=path), path, "no such file", "check the path")
    told(lambda: isadca.load(DEMO, vae=path), path, "no such file", "check the path")
    told(lambda: isadca.load(DEMO, image_encoder=path), path, "no such file", "check the path")


def test_folder_instead_of_a_file(tmp_path):
    told(lambda: isadca.load(tmp_path), tmp_path, "no unet folder", "--weights takes a diffusers folder or one")
    told(lambda: checkpoints.recognise(tmp_path), tmp_path, "is a folder", "expected a .safetensors file")
    told(lambda: inspect.parts_of(tmp_path), tmp_path, "no unet folder and no .safetensors files")


def test_folder_around_a_single_file_names_the_file(tmp_path):
    write_sparse(tmp_path / "v1-5-pruned-emaonly.safetensors", LDM)
    told(lambda: isadca.load(tmp_path), tmp_path, "such as v1-5-pruned-emaonly.safetensors in it")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_missing_part_folder(tmp_path, name):
    folder = demo_without(tmp_path / "model", name)
    path, words = (folder, ["has no unet folder"]) if name == "unet" else (folder / name, ["no such", "complete"])
    told(lambda: isadca.load(folder), path, *words)


@pytest.mark.parametrize("name, pickled", [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "model.ckpt"),
                                           ("vae", "diffusion_pytorch_model.pth")])
def test_part_folder_with_a_pickle_only(tmp_path, monkeypatch, name, pickled):
    monkeypatch.chdir(tmp_path)
    folder = demo_without(Path("model"), name)
    (folder / name).mkdir()
    told(lambda: isadca.load(folder), folder / name, "no .safetensors file", "get the .safetensors version")
    torch.save({"conv_in.weight": torch.zeros(4)}, folder / name / pickled)
    told(lambda: isadca.load(folder), folder / name, f"only {pickled}, a pickle", "get the .safetensors version")


@pytest.mark.parametrize("dropped, kind", [("model.diffusion_model.", "unet"), ("first_stage_model.", "vae"),
                                           ("cond_stage_model.", "text")])
def test_single_file_without_one_part(tmp_path, dropped, kind):
    path = write_sparse(tmp_path / "x.safetensors", {k: v for k, v in LDM.items() if not k.startswith(dropped)})
    told(lambda: isadca.load(path), path, f"but no {kind}", "--weights takes the whole model")


def test_file_of_another_part():
    adapter = DEMO / "ip-adapter_demo.safetensors"
    told(lambda: isadca.load(DEMO, image_encoder=adapter), adapter, "holds ip_adapter, expected vision")
    told(lambda: isadca.load(adapter), adapter, "holds ip_adapter but no unet", "--weights takes the whole model")
    told(lambda: isadca.load(DEMO, ip_adapter=DEMO / "vae"), DEMO / "vae" / "diffusion_pytorch_model.safetensors",
         "holds vae, expected ip_adapter")


@pytest.mark.parametrize("name, file, key, value", [
    ("unet", "config.json", "use_linear_projection", True), ("vae", "config.json", "shift_factor", 0.1159),
    ("scheduler", "scheduler_config.json", "prediction_type", "v_prediction")])
def test_folder_of_a_model_with_other_mathematics(tmp_path, name, file, key, value):
    folder = demo_without(tmp_path / "model", name)
    shutil.copytree(DEMO / name, folder / name, copy_function=shutil.copyfile)
    config = json.loads((folder / name / file).read_text())
    (folder / name / file).write_text(json.dumps(config | {key: value}))
    told(lambda: isadca.load(folder), folder / name / file, f"{key} is {value!r}", "plain Stable Diffusion 1.x")


def test_vocabulary_of_another_model():
    """The demo's 745 tokens under SD1.5's text encoder, and CLIP's vocabulary under the demo's."""
    told(lambda: loading.load_tokenizer(DEMO, CLIPTextConfig()), DEMO / "tokenizer", "a vocabulary of 745 tokens",
         "the text encoder has 49408", "different models")
    told(lambda: loading.load_tokenizer(Path("single.safetensors"), CLIPTextConfig(vocab_size=745)),
         DEMO.parent / "tokenizer", "a vocabulary of 49408 tokens", "has 745", "different models")
