"""inf and NaN: noticed at each stage, with its name, step and dtype, and without making a GPU wait."""

import pytest
import torch
from conftest import DEMO, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

import isadca
from isadca.common.problem import Problem
from isadca.networks.model import Watch

GREY = Image.new("RGB", (16, 16), "gray")


def test_a_device_is_asked_once_after_the_loop(tiny):
    """On meta, which stands for a GPU here, reading any value raises."""
    watch = Watch(tiny, "sampling")
    for t in (981, 961, 941):
        watch(torch.zeros(1, 4, 2, 2, device="meta"), t)
    with pytest.raises(RuntimeError, match="meta"):
        watch.done()
    watch.flags = [(981, torch.tensor(True)), (961, torch.tensor(False)), (941, torch.tensor(False))]
    with pytest.raises(Problem, match="sampling: inf or NaN from step t = 961 on, in float64"):
        watch.done()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_cpu_stops_at_the_first_bad_step(tiny, tiny_ref, monkeypatch, bad):
    calls, noise = [], tiny.noise

    def broken(z, t, *inputs):
        calls.append(t)
        return noise(z, t, *inputs) + (bad if len(calls) == 3 else 0)
    monkeypatch.setattr(tiny, "noise", broken)
    for run, stage in [(lambda: isadca.invert(tiny, GREY, 6), "inverting"),
                       (lambda: isadca.reconstruct(tiny, tiny_ref), "reconstructing"),
                       (lambda: isadca.vary(tiny, tiny_ref, "a", isadca.Method(lam=0.0)), "sampling")]:
        calls.clear()
        with pytest.raises(Problem, match=f"^{stage}: inf or NaN from step t = \\d+ on, in float64; try a") as problem:
            run()
        assert len(calls) == 3 and f"t = {calls[2]} on" in str(problem.value)


def test_on_a_gpu_each_loop_asks_at_its_end(tiny, tiny_ref, monkeypatch):
    """A CPU that leaves its flags as a GPU does; all steps run before the Problem."""
    def leave(self, x, t=None):
        self.flags.append((t, x.isfinite().all()))
        return x
    monkeypatch.setattr(Watch, "__call__", leave)
    monkeypatch.setattr(tiny, "noise", lambda z, *rest: calls.append(z) or z * torch.nan)
    for run in (lambda: isadca.invert(tiny, GREY, 6), lambda: isadca.reconstruct(tiny, tiny_ref),
                lambda: isadca.vary(tiny, tiny_ref, "a", isadca.Method(lam=0.0, ip_scale=0.0))):
        calls = []
        with pytest.raises(Problem, match="inf or NaN from step t"):
            run()
        assert len(calls) == 6


@pytest.mark.parametrize("dtype, advice", [(torch.float16, "try --dtype fp32"), (torch.float32, "try another picture")])
def test_what_to_try_depends_on_the_dtype(dtype, advice):
    """Weights that are finite but too strong: half precision is the likely culprit, if it is used."""
    model = tiny_model(dtype)
    model.unet.conv_out.weight.data *= 6e4 if dtype == torch.float16 else 1e38
    assert all(p.isfinite().all() for p in model.unet.parameters())
    with pytest.raises(Problem, match=f"in {str(dtype)[6:]}; {advice}"):
        isadca.invert(model, GREY, 6)


def test_an_infinite_weight_is_blamed_on_the_file_unless_rounding_made_it():
    for dtype, advice in [(torch.float32, "unet holds them in conv_out.bias"), (torch.float16, "try --dtype fp32")]:
        model = tiny_model(dtype)
        model.unet.conv_out.bias.data.fill_(torch.inf)
        with pytest.raises(Problem, match=advice):
            isadca.invert(model, GREY, 6)


def test_no_vae_is_ever_in_half_precision(tmp_path):
    """Its decoder overflows in fp16, and in bf16 rounds pictures by up to 43 grey levels. Whatever precision is asked
    for and stored, it works in float32."""
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    (tmp_path / "config.json").symlink_to(DEMO / "vae" / "config.json")
    save_file({key: t.half() for key, t in load_file(DEMO / "vae" / file.name).items()}, file)
    for dtype, half in [("fp16", torch.float16), (torch.float16, torch.float16), ("bf16", torch.bfloat16)]:
        model = isadca.load(vae=file, device="cpu", dtype=dtype)
        assert model.dtype == half and {p.dtype for p in model.vae.parameters()} == {torch.float32}
