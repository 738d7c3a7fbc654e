"""Wrong weights through the command line: one line on standard error that names the file and the remedy, exit code
2, nothing written. What the loader says to Python is in test_bad_weights.py."""

from pathlib import Path

import pytest
import torch
from commandline import CAT, entry, raw, refused, vary
from conftest import DEMO
from keyfiles import listing, write_sparse
from safetensors.torch import load_file, save_file

DAMAGED, PLEASE = "is not a whole safetensors file", "; download it again"
BYTES = {  # the errors of the safetensors library, by name, and what is no safetensors file at all
    "HeaderTooSmall": (b"\3\0\0", DAMAGED), "HeaderTooLarge": (raw(b"{}", length=10**9), DAMAGED),
    "InvalidHeaderLength": (raw(b"{}", length=999), DAMAGED), "InvalidHeader, not UTF-8": (raw(b'{"\xff":0}'), DAMAGED),
    "InvalidHeaderStart": (raw(b"[1, 2]"), DAMAGED), "InvalidHeaderDeserialization": (raw(b'{"a": '), DAMAGED),
    "InvalidHeaderDeserialization, dtype": (raw({"a": entry(0, 8, dtype="F42")}, bytes(8)), DAMAGED),
    "TensorInvalidInfo": (raw({"a": entry(0, 8, (3,))}, bytes(8)), DAMAGED),
    "InvalidOffset, a hole": (raw({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)), DAMAGED),
    "InvalidOffset, an overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), DAMAGED),
    "InvalidOffset, backwards": (raw({"a": entry(8, 0)}, bytes(8)), DAMAGED),
    "MetadataIncompleteBuffer, short": (raw({"a": entry(0, 8)}, bytes(7)), DAMAGED),
    "MetadataIncompleteBuffer, long": (raw({"a": entry(0, 8)}, bytes(9)), DAMAGED),
    "ValidationOverflow": (raw({"a": entry(0, 8, (2**40, 2**40))}, bytes(8)), DAMAGED),
    "MisalignedSlice": (raw({"a": entry(0, 1, (1,), "F4")}, bytes(1)), DAMAGED),
    "a header that fills the memory": (raw({f"{i:0200}": entry(0, 0, (0,)) for i in range(80_000)}),
                                       "download it again (a header of "),
    "a header of brackets": (raw(b'{"a":' + b"[" * 100_000), DAMAGED),
    "zero bytes": (b"", "is empty"), "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>", DAMAGED),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_are_no_weights(folder, capsys, case):
    path = folder / "model.safetensors"
    path.write_bytes(BYTES[case][0])
    refused(capsys, vary("--weights", path), str(path), BYTES[case][1], "; ")


def changed(part: str, **tensors):
    """A maker of the demo's folder with some tensors of one part replaced by what a function makes of them."""
    def make(folder: Path) -> Path:
        (folder / "model").mkdir()
        for item in DEMO.iterdir():
            if item.name != part:
                (folder / "model" / item.name).symlink_to(item)
        source = next((DEMO / part).glob("*.safetensors")) if (DEMO / part).is_dir() else DEMO / part
        state = load_file(source)
        target = folder / "model" / source.relative_to(DEMO)
        target.parent.mkdir(exist_ok=True)
        if (source.parent / "config.json").exists():
            (target.parent / "config.json").symlink_to(source.parent / "config.json")
        for key, change in tensors.items():
            key = next(k for k in state if k.endswith(key.replace("__", ".")))
            state[key] = change(state[key]).contiguous()
        save_file(state, target)
        return folder / "model"
    return make


def sparse(tensors: dict):
    return lambda folder: write_sparse(folder / "model.safetensors", tensors)


def pickled(folder: Path) -> Path:
    torch.save({"conv_in.weight": torch.zeros(4)}, folder / "model.ckpt")
    return folder / "model.ckpt"


def fp8(tensor):
    return tensor.to(torch.float8_e4m3fn)


UNET, LDM = listing("sd15_diffusers_unet"), listing("sd15_single_file_ldm_emaonly")
ADAPTER = listing("ip-adapter_sd15")
INPUT = "model.diffusion_model.input_blocks.0.0.weight"
WEIGHTS = {  # what it is: (flag, maker of the file, what the line says)
    "no such file": ("--weights", lambda f: f / "nothing", "no such file or folder", "; --weights takes"),
    "an empty folder": ("--weights", lambda f: f, "has no unet folder", "; --weights takes"),
    "a folder for a file": ("--ip-adapter", lambda f: f, "no .safetensors file"),
    "a folder of another part": ("--vae", lambda f: DEMO / "unet", "holds unet, expected vae"),
    "SD 2": ("--weights", sparse({k: v for k, v in LDM.items() if "cond_stage" not in k} | {
        "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": ("F32", (8,))}), "an SD 2.x model", "1.x"),
    "SDXL": ("--weights", sparse(UNET | {"add_embedding.linear_1.weight": ("F16", (8, 8))}), "an SDXL model", "1.x"),
    "inpainting": ("--weights", sparse(LDM | {INPUT: ("F32", (320, 9, 3, 3))}), "an inpainting or editing model"),
    "a LoRA": ("--weights", sparse({"lora_unet_mid.alpha": ("F16", ())}), "a LoRA", "; merge it"),
    "a ControlNet": ("--weights", sparse({"control_model.input_hint_block.0.weight": ("F16", (8,))}), "a ControlNet"),
    "a pickle": ("--weights", pickled, "is a pickle", "; get the .safetensors version"),
    "fp8": ("--weights", changed("unet", conv_in__weight=fp8), "conv_in.weight is F8_E4M3", "fp16"),
    "int8": ("--vae", lambda f: changed("vae", encoder__conv_in__weight=torch.Tensor.char)(f) / "vae", "is I8", "fp16"),
    "NaN in the UNet": ("--weights", changed("unet", conv_out__bias=lambda t: t.fill_(torch.nan)), "inverting",
                        "t = 1 on", "NaN", "conv_out.bias", "download it again"),
    "NaN in the VAE's encoder": ("--weights", changed("vae", encoder__conv_in__bias=lambda t: t.fill_(torch.nan)),
                                 "encoding", "encoder.conv_in.bias", "download it again"),
    "inf in the VAE's decoder": ("--weights", changed("vae", decoder__conv_out__bias=lambda t: t.fill_(torch.inf)),
                                 "decoding", "decoder.conv_out.bias", "download it again"),
    "NaN in the text encoder": ("--weights", changed("text_encoder", final_layer_norm__bias=lambda t: t * torch.nan),
                                "inverting", "final_layer_norm.bias", "download it again"),
    "NaN in the adapter": ("--weights", changed("ip-adapter_demo.safetensors", to_v_ip__weight=lambda t: t * torch.nan),
                           "sampling", "t = 501 on", "to_v_ip.weight", "download it again"),
    "another UNet's adapter": ("--ip-adapter", sparse(ADAPTER), "made for another UNet", "; SD 1.5 takes"),
    "an adapter of another encoder": ("--weights", changed(
        "ip-adapter_demo.safetensors", image_proj__proj__weight=lambda t: torch.zeros(len(t), 1024)),
        "reads 1024-wide image features", "; it needs ViT-H, h94's models/image_encoder (--image-encoder)"),
    "a picture": ("--weights", lambda f: Path(CAT), DAMAGED, "; download it again"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit(folder, capsys, case):
    flag, make, *words = WEIGHTS[case]
    path = make(folder)
    refused(capsys, vary(flag, path), str(path), *words)
