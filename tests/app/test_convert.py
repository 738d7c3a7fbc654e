"""isadca convert: pickles of every kind that people have become safetensors that load; code in them does not run."""

import os
import pickle
import shlex
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from controlnet_shuffle import ControlNet, load_controlnet
from keyfiles import KEYS, listing
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import isadca
from isadca.app.cli import main
from isadca.app.convert import convert
from isadca.common.problem import Problem
from isadca.evaluation.metrics import load_metric, trunk_keys
from isadca.loading.checkpoints import recognise
from isadca.networks.sizes import UNetConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}
ADAPTER = load_file(DEMO / "ip-adapter_demo.safetensors")


def pickled(path: Path, content, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def tiny(name: str) -> dict[str, torch.Tensor]:
    """A tensor of one number under each key of a published file, in its dtype."""
    return {key: torch.full((1,), i, dtype=DTYPES[dtype]) for i, (key, (dtype, _)) in enumerate(listing(name).items())}


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


# --- what is converted --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", [path.stem for path in sorted(KEYS.glob("*.tsv")) if path.stem[:3] != "map"])
def test_every_published_key_list(tmp_path, out, name, zipped):
    """Each file as a .bin under the same keys, in both of PyTorch's formats; and nested under "state_dict"."""
    tensors = tiny(name)
    assert convert(pickled(tmp_path / "a.bin", tensors, zipped), out) == []
    same(out, tensors)
    training = {"state_dict": tensors, "optimizer_states": [{"exp_avg": torch.ones(3)}], "epoch": 3}
    convert(pickled(tmp_path / "b.ckpt", training, zipped), out)
    same(out, tensors)
    assert safe_open(out, "pt").metadata() == {"format": "pt"}


def test_a_nested_ip_adapter_is_the_flat_one(tmp_path, out):
    nested = {part: {key.removeprefix(f"{part}."): t for key, t in ADAPTER.items() if key.startswith(f"{part}.")}
              for part in ("image_proj", "ip_adapter")}
    assert convert(pickled(tmp_path / "a.bin", nested), out) == []
    same(out, ADAPTER)
    isadca.load(DEMO, ip_adapter=out, device="cpu")


@pytest.mark.parametrize("name", ["ip-adapter_sd15", "ip-adapter-plus_sd15", "ip-adapter-full-face_sd15"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_an_ip_adapters_training_checkpoint(tmp_path, out, name, shared, suffix):
    """adapter_modules beside the UNet, or in it alone; the layers by their number in either."""
    published = tiny(name)
    training = {key.replace("image_proj.", "image_proj_model."): t for key, t in published.items()}
    training = {key.replace("ip_adapter.", "adapter_modules."): t for key, t in training.items()}
    if shared:
        blocks = [f"{place}_blocks.{i}.attentions.{j}" for place, many in [("down", (2, 2, 2)), ("up", (0, 3, 3, 3))]
                  for i, n in enumerate(many) for j in range(n)] + ["mid_block.attentions.0"]
        names = {f"adapter_modules.{2 * i + 1}.": f"unet.{block}.transformer_blocks.0.attn2.processor."
                 for i, block in enumerate(blocks)}
        training = {next((key.replace(a, b) for a, b in names.items() if key.startswith(a)), key): t
                    for key, t in reversed(training.items())}
    training["unet.conv_in.weight"] = torch.zeros(1, dtype=torch.float16)
    source = tmp_path / f"model{suffix}"
    save_file(training, source) if suffix == ".safetensors" else pickled(source, training)
    assert convert(source, out) == ["unet.conv_in.weight"]
    same(out, published)
    assert list(recognise(out)) == ["ip_adapter"]


@pytest.mark.parametrize("kind", ["alex", "vgg", "inception", "alex heads"])
def test_the_metrics_weights(tmp_path, out, kind):
    """torchvision's trunks, with their classifiers and counters, and the heads of the lpips package, legacy format."""
    tensors = {key: torch.randn(2, 3) for key in trunk_keys(kind)}
    more = {"classifier.1.weight": torch.randn(4, 4), "fc.num_batches_tracked": torch.tensor(7)}
    convert(pickled(tmp_path / "a.pth", tensors | more, zipped="heads" not in kind), out)
    same(out, tensors | more)
    assert all(torch.equal(t, tensors[key]) for key, t in load_metric(out, kind).items())


def test_a_controlnet_loads(tmp_path, out):
    """lllyasviel's .pth: half of a UNet under control_model., wrapped."""
    config = UNetConfig(channels=(16, 32), attention=(True, False), norm_groups=8, n_heads=2, context_dim=24)
    tensors = ControlNet(config, (4, 8)).state_dict()
    convert(pickled(tmp_path / "control.pth", {"state_dict": tensors}), out)
    load_controlnet(out, config)


def test_a_whole_model_from_the_messages_command(tmp_path, monkeypatch, capsys):
    """The folder has pickles alone; the error names a command; once these have run, the folder loads."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(DEMO, "model", copy_function=shutil.copyfile))
    for path in [next((folder / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")]:
        pickled(path.with_suffix(".bin"), load_file(path))
        path.unlink()
    for _ in range(3):
        with pytest.raises(Problem, match="a pickle, which can run code") as caught:
            isadca.load(folder, device="cpu")
        program, *argv = shlex.split(str(caught.value).partition("or make it: ")[2])
        assert program == "isadca" and main(argv) == 0
    isadca.load(folder, device="cpu")
    written = capsys.readouterr()
    assert [Path(line).suffix for line in written.out.splitlines()] == [".safetensors"] * 3 and written.err == ""


def test_shared_and_cut_tensors_are_told_apart(tmp_path, out):
    """Two names of one tensor, a view of a larger one, one that is not contiguous, a parameter."""
    large = torch.arange(12.).view(3, 4)
    tensors = {"a": large, "b": large, "row": large[1], "turned": large.T, "p": torch.nn.Parameter(torch.ones(2)),
               "cut": torch.zeros(1000, 4)[3:4], "half": torch.ones(2).bfloat16(), "none": torch.zeros(0)}
    assert convert(pickled(tmp_path / "a.bin", tensors), out) == []
    same(out, {key: tensor.detach() for key, tensor in tensors.items()})
    assert out.stat().st_size < 2000


def test_what_is_no_tensor_is_left_out_and_said(tmp_path, out, capsys):
    source = pickled(tmp_path / "a.ckpt", {"w": torch.ones(2), "epoch": 3, "config": {"name": "x", "lr": [1, 2]}})
    assert main(["convert", str(source), "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert printed.err == ("isadca: note: 3 left out, no tensors or not the adapter's: config.lr, config.name, epoch\n")
    same(out, {"w": torch.ones(2)})


class Gone:
    """Stands for a class of a library that is not installed where the file is read."""


class GoneDict(dict):
    pass


def test_a_trainers_checkpoint(tmp_path, out, monkeypatch):
    """Lightning's: callbacks by class, NumPy's scalars and arrays, dicts of its own, paths. Only the tensors matter."""
    import collections

    import numpy as np
    for name in (Gone, GoneDict):
        monkeypatch.setattr(name, "__module__", "lightning_of_some_version")
    monkeypatch.setitem(sys.modules, "lightning_of_some_version", sys.modules[__name__])
    training = {"state_dict": tiny("ip-adapter_sd15"), "callbacks": {Gone: {"best": np.float64(0.5)}}, "loop": Gone(),
                "hyper_parameters": GoneDict(lr=1e-4, where=Path("/x")), "array": np.arange(3),
                "counts": collections.defaultdict(list, a=[1]), "seen": {1, 2}}
    for zipped in (True, False):
        source = pickled(tmp_path / f"{zipped}.ckpt", training, zipped)
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "lightning_of_some_version")
            assert convert(source, out) == []
        same(out, training["state_dict"])


# --- what is refused ----------------------------------------------------------------------------------------------

class Bomb:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refused(source: Path, out: Path, capsys, *words: str) -> None:
    """Exit 2, one line that names the file and has the words, nothing written."""
    before = set(source.parent.iterdir())
    assert main(["convert", str(source), "-o", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert all(word in printed.err for word in (str(source), *words)), printed.err
    assert set(source.parent.iterdir()) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, out, capsys, zipped):
    trace = tmp_path.parent / f"ran-{zipped}"
    source = pickled(tmp_path / "a.bin", {"w": torch.ones(2), "x": Bomb(f"touch {trace}")}, zipped)
    refused(source, out, capsys, "refused", "system", "get the .safetensors version")
    for protocol, words in [(2, "refused, it would load or run"), (5, "not a whole file that torch.save wrote")]:
        source.write_bytes(pickle.dumps(Bomb(f"touch {trace}"), protocol))
        refused(source, out, capsys, words)
    assert not trace.exists()


def test_a_whole_module_is_refused(tmp_path, out, capsys):
    refused(pickled(tmp_path / "a.pt", torch.nn.Linear(2, 2)), out, capsys, "refused", "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("content", [b"", b"hello, these are not weights", b"PK\3\4" + bytes(100), pickle.dumps([1, 2]),
                                     pickle.dumps({"a": 1}, 2)[:-3]])
def test_other_and_damaged_files(tmp_path, out, capsys, content):
    source = tmp_path / "a.bin"
    source.write_bytes(content)
    refused(source, out, capsys, "not a whole file that torch.save wrote", "download it again")


def test_every_truncation_of_a_file_is_explained(tmp_path, out, capsys):
    whole = pickled(tmp_path / "a.bin", {"w": torch.randn(300)}).read_bytes()
    for length in range(1, len(whole), 97):
        (tmp_path / "a.bin").write_bytes(whole[:length])
        refused(tmp_path / "a.bin", out, capsys)


def test_other_contents(tmp_path, out, capsys):
    refused(pickled(tmp_path / "a.bin", [torch.ones(2)]), out, capsys, "holds a list, expected a dict of tensors")
    refused(pickled(tmp_path / "a.bin", {"epoch": 3}), out, capsys, "holds no tensors")
    refused(pickled(tmp_path / "a.bin", {"w": torch.ones(2).to_sparse()}), out, capsys)
    save_file(ADAPTER, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", out, capsys, "is in safetensors already")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**40))
    refused(tmp_path / "a.safetensors", out, capsys, "not a whole safetensors file")
    refused(tmp_path / "missing.bin", out, capsys, "no such file")
    refused(tmp_path, out, capsys, "no such file")


def test_a_file_that_may_not_be_read_is_not_just_called_damaged(tmp_path, out, capsys, monkeypatch):
    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")
    source = pickled(tmp_path / "a.bin", {"w": torch.ones(2)})
    monkeypatch.setattr(torch, "load", denied)
    refused(source, out, capsys, "may not be read (PermissionError); download it again, or look at its permissions")


ITSELF = {"w": torch.ones(2)}
ITSELF["again"] = ITSELF
SHARED = {"w": torch.ones(2)}
for _ in range(18):
    SHARED = {key: SHARED for key in "abcd"}
ODD = {  # what torch.save writes and a dict of tensors is not
    "state_dict is None": ({"state_dict": None}, "holds a NoneType"),
    "state_dict is a list": ({"state_dict": [torch.ones(2)]}, "holds a list"),
    "1 and '1'": ({1: torch.ones(2), "1": torch.zeros(2)}, "two tensors would be named 1"),
    "a.b and a: b": ({"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)}, "two tensors would be named a.b"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "w is no plain tensor (complex64"),
    "sparse": ({"w": torch.ones(2).to_sparse()}, "w is no plain tensor (float32, torch.sparse_coo)"),
    "quantised": ({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "w is no plain tensor (qint8"),
    "one number a million times": ({"w": torch.ones(1).expand(10**12)}, "w is no plain tensor"),
    "a name that safetensors keeps": ({"__metadata__": torch.ones(2)}, "a tensor is named __metadata__"),
    "itself": (ITSELF, "hold one another without end"),
    "shared 4^18 times": (SHARED, "hold one another without end"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_dict_of_plain_tensors(tmp_path, out, capsys, case):
    content, words = ODD[case]
    refused(pickled(tmp_path / "a.bin", content), out, capsys, words, "expected" if "named" not in words else "; ")


def test_the_source_is_never_replaced(tmp_path):
    """By its own path, or by a link to it."""
    source = tmp_path / "a.safetensors"
    save_file({"image_proj_model.norm.weight": torch.ones(2)}, source)
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for name in ("a", "link"):
        with pytest.raises(Problem, match="is the file to write, too; choose another -o"):
            convert(source, tmp_path / f"{name}.safetensors")
    assert source.read_bytes() == before


def test_an_old_torch_does_not_unpickle(tmp_path, out, capsys, monkeypatch):
    source = pickled(tmp_path / "a.bin", ADAPTER)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert main(["convert", str(source), "-o", str(out)]) == 2 and not out.exists()
    assert "torch 2.9.1+cpu is too old to open pickles safely" in capsys.readouterr().err
