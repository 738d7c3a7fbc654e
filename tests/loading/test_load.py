"""load(): which files it takes, what it makes of them in each precision, and that it copies and invents nothing."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT
from keyfiles import listing, write_sparse
from safetensors.torch import load_file, save_file
from tolerances import UNET_HALF

import isadca
from isadca.common.device import dtype_named
from isadca.common.problem import Problem
from isadca.loading import load as loading

NETWORKS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


@pytest.fixture(scope="module")
def resaved(tmp_path_factory):
    """The demo with each network saved twice: in float32, and in float16 as *.fp16.safetensors beside it."""
    folder = tmp_path_factory.mktemp("resaved") / "demo"
    shutil.copytree(DEMO, folder, copy_function=shutil.copyfile)
    for name in NETWORKS.values():
        file, = (folder / name).glob("*.safetensors")
        tensors = load_file(file)
        save_file({key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}, file)
        halves = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"))
    return folder


def our_name(key: str) -> str:
    """transformers 5 saves the text encoder without text_model.; our names have it."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def read(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """A file's tensors by our names, without the position numbers, which are no weights."""
    return {our_name(key) if kind == "text" else key: t for key, t in load_file(path).items()
            if not key.endswith("position_ids")}


@pytest.mark.parametrize("name", DTYPES)
def test_every_tensor_is_the_files_in_the_wanted_precision(name):
    """Nothing is missing, made up or left on meta. The VAE, which overflows in fp16 and rounds in bf16, is in fp32."""
    model = isadca.load(DEMO, device="cpu", dtype=name)
    assert model.dtype == DTYPES[name]
    for kind in (*NETWORKS, "ip_adapter"):
        network, file = getattr(model, kind), read(model.files[kind], kind)
        dtype = torch.float32 if kind == "vae" and DTYPES[name].itemsize == 2 else DTYPES[name]
        state = network.state_dict()
        assert state.keys() == file.keys()
        assert {(t.dtype, t.device.type) for t in state.values()} == {(dtype, "cpu")}
        assert not [key for key, t in state.items() if not torch.equal(t, file[key].to(dtype))]
        assert {*map(id, network.buffers())} <= {*map(id, state.values())}  # no buffer that no file fills


def test_networks_are_ready_to_use_and_gradients_flow_through_them(demo):
    networks = [demo.unet, demo.vae, demo.text, demo.vision, demo.ip_adapter]
    assert not any(module.training for network in networks for module in network.modules())
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
    z = torch.randn(1, 4, 16, 16, requires_grad=True)
    demo.noise(z, 500, demo.context([""])).sum().backward()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("name, marked", [("fp32", False), ("fp64", False), ("fp16", True), ("bf16", True)])
def test_the_file_of_the_nearer_precision_is_taken(resaved, name, marked):
    files = isadca.load(resaved, device="cpu", dtype=name).files
    assert {kind: ".fp16." in files[kind].name for kind in NETWORKS} == dict.fromkeys(NETWORKS, marked)


@pytest.mark.parametrize("left", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
def test_the_only_file_is_taken_whatever_its_precision(resaved, tmp_path, left):
    shutil.copy(resaved / "unet" / left, tmp_path)
    shutil.copy(resaved / "unet" / left, tmp_path / "diffusion_pytorch_model.non_ema.safetensors")  # training's
    for dtype in DTYPES.values():
        assert loading.find_part(tmp_path, "unet", dtype).path == tmp_path / left


def test_float32_weights_stay_in_the_mapped_file(resaved):
    """Evidence that nothing is copied: every tensor lies at its own file offset from ONE address."""
    model = isadca.load(resaved, device="cpu", dtype="fp32")
    for kind in NETWORKS:
        with open(model.files[kind], "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        offsets = {our_name(key) if kind == "text" else key: entry["data_offsets"][0]
                   for key, entry in header.items() if key != "__metadata__"}
        state = getattr(model, kind).state_dict()
        assert len({t.data_ptr() - offsets[key] for key, t in state.items()}) == 1


def test_both_files_give_the_same_picture_to_rounding(resaved, demo):
    """float32 and float16 files of the same weights, and the demo itself, agree on a forward pass."""
    z, context = torch.randn(1, 4, 16, 16), demo.context(["a cat"])
    expected = demo.noise(z, 500, context)
    torch.testing.assert_close(isadca.load(resaved, device="cpu", dtype="fp32").noise(z, 500, context), expected)
    half = isadca.load(resaved, device="cpu", dtype="bf16").noise(z, 500, context.bfloat16())
    assert (half - expected).norm() < UNET_HALF[torch.bfloat16] * expected.norm()


def test_another_vae_replaces_the_models_own(resaved, tmp_path):
    tensors = load_file(resaved / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({key: 2 * t for key, t in tensors.items()}, tmp_path / "other.safetensors")
    shutil.copy(DEMO / "vae" / "config.json", tmp_path)
    for given in (tmp_path, tmp_path / "other.safetensors"):  # a folder or a file
        model = isadca.load(DEMO, vae=given, device="cpu", dtype="fp32")
        assert model.files["vae"] == tmp_path / "other.safetensors"
        assert all(torch.equal(t, 2 * tensors[key]) for key, t in model.vae.state_dict().items())


def test_without_an_adapter_the_image_encoder_is_not_loaded_either():
    model = isadca.load(DEMO, ip_adapter="none", device="cpu")
    assert model.ip_adapter is None and model.vision is None and model.files.keys() == {"unet", "vae", "text"}


def test_without_weights_it_is_the_demo():
    assert isadca.load(device="cpu").files["unet"].parent.parent == DEMO


# --- where the adapter and its image encoder are found --------------------------------------------------------------

ALL = ["ip-adapter_sd15", "ip-adapter_sd15_light", "ip-adapter-plus_sd15", "ip-adapter-full-face_sd15",
       "ip-adapter_sd15_vit-G"]


def located(weights: Path, **given) -> dict[str, Path]:
    return {kind: path for kind, path in loading.locate(weights, **given).items() if kind in ("ip_adapter", "vision")}


@pytest.mark.parametrize("where", ["", "models"])
@pytest.mark.parametrize("weights", ["", "v1-5-pruned-emaonly.safetensors"])
def test_base_adapter_is_found_inside_or_beside_the_weights(tmp_path, where, weights):
    (tmp_path / "unet").mkdir()
    (tmp_path / where).mkdir(exist_ok=True)
    for name in ["v1-5-pruned-emaonly", *[f"{where}/{name}" if where else name for name in ALL]]:
        (tmp_path / f"{name}.safetensors").touch()
    assert located(tmp_path / weights) == {"ip_adapter": tmp_path / where / "ip-adapter_sd15.safetensors"}
    assert located(tmp_path / weights, ip_adapter="none") == {}
    assert located(tmp_path / weights, ip_adapter="other.safetensors") == {"ip_adapter": Path("other.safetensors")}


def test_no_adapter_is_found_where_there_is_none(tmp_path):
    (tmp_path / "unet").mkdir()
    assert located(tmp_path) == {}


@pytest.mark.parametrize("adapter, folder", [
    ("models/ip-adapter_sd15", "models"), ("models/ip-adapter-plus_sd15", "models"),
    ("models/ip-adapter_sd15_vit-G", "sdxl_models")])
def test_encoder_is_found_in_h94s_folders(tmp_path, adapter, folder):
    """vit-G reads bigG's embedding, which h94 keeps under sdxl_models; all the others read ViT-H's."""
    for name in ("h94/models", "h94/sdxl_models", "sd15/unet"):
        (tmp_path / name / "image_encoder").mkdir(parents=True)
    found = located(tmp_path / "sd15", ip_adapter=tmp_path / "h94" / f"{adapter}.safetensors")
    assert found["vision"] == tmp_path / "h94" / folder / "image_encoder"


def test_given_encoder_comes_before_found_ones():
    assert located(DEMO, image_encoder="mine")["vision"] == Path("mine")
    assert located(DEMO)["vision"] == DEMO / "image_encoder"
    assert located(DEMO, image_encoder="none").keys() == {"ip_adapter"}


# --- flags ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (dict(dtype="fp8"), ["dtype is 'fp8'", "expected auto, fp32, fp16"]),
    (dict(device="toaster"), ["device 'toaster' is not available here", "try --device cpu"])])
def test_wrong_flag(flags, words):
    with pytest.raises(Problem) as caught:
        isadca.load(DEMO, **({"device": "cpu"} | flags))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_auto_precision_is_half_on_cuda_and_single_elsewhere():
    assert dtype_named("auto", torch.device("cuda")) == torch.float16
    assert {dtype_named("auto", torch.device(name)) for name in ("cpu", "mps")} == {torch.float32}


# --- true size ------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys, time
from pathlib import Path
import torch, isadca
from isadca.loading import checkpoints, load as loading
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
def once(path):
    start = time.perf_counter()
    for part in checkpoints.recognise(path).values():
        keep.append(checkpoints.load_into(loading.build(part), part, torch.float32))
    return time.perf_counter() - start
keep, before = [], peak()
times = [once(Path(sys.argv[1])) for _ in range(3)]
print(json.dumps([min(times), (peak() - before) / 2**20, sum(p.numel() for p in keep[0].parameters())]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_diffusers_unet", "sd15_single_file_ldm_emaonly"])
def test_loading_true_size_weights_costs_neither_time_nor_memory(tmp_path, name):
    """3.4 GB in under 3 s and 600 MB, three times over: built without initialising, mapped without copying."""
    path = write_sparse(tmp_path / "model.safetensors", listing(name))
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, megabytes, count = json.loads(done.stdout)
    assert count == 859_520_964 and seconds < 3 and megabytes < 600
