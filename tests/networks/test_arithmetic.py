"""What a step costs at SD1.5's size: torch's counter on meta tensors against the closed form of the benchmark."""

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT, tiny_model
from memory import LiveBytes
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import isadca
from isadca.attention import attend, blend, by_kind, capture, dca, isa
from isadca.networks.sizes import UNetConfig
from isadca.networks.unet import UNet

SMALL = UNetConfig(channels=(16, 32, 48), attention=(True, True, False), layers_per_block=1, n_heads=2,
                   context_dim=24, norm_groups=8)


def load_script():
    spec = importlib.util.spec_from_file_location("arithmetic", ROOT / "examples" / "benchmark" / "arithmetic.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


arithmetic = load_script()


@pytest.fixture(scope="module", params=[(UNetConfig(), 64), (SMALL, 16)], ids=["SD1.5", "small"])
def counted(request):
    """FLOP of one row under each attention function, as torch counts them."""
    config, side = request.param
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False)
        z, context = torch.randn(1, 4, side, side), torch.randn(1, 77, config.context_dim)
        store = {}
        unet(z, 1, context, capture(store))
        ip = {site.name: tuple(torch.randn(1, config.n_heads, 4, unet.get_submodule(site.name).to_q.out_features
                                           // config.n_heads) for _ in "kv") for site in unet.sites}

        def count(f, *inputs):
            with FlopCounterMode(display=False) as counter:
                f(*inputs)
            return counter.get_total_flops()
        kv = unet.keys_values(context)
        variants = {"plain": attend, "append": isa(store), "replace": isa(store, "replace"), "dca": dca(ip),
                    "both": by_kind(blend(attend, isa(store), 0.7), dca(ip, 0.3))}
        found = {name: count(unet, z, 1, kv, f) for name, f in variants.items()}
        return config, side, found | {"text": count(unet.keys_values, context), "whole": count(unet, z, 1, context)}


def test_the_closed_form_is_what_torch_counts(counted):
    config, side, found = counted
    forward = lambda **changes: arithmetic.forward(config, side, **changes)
    text = arithmetic.text_keys_values(config, side)
    expected = {"plain": forward(), "append": forward(self_products=2), "replace": forward(),
                "dca": forward(tokens=81), "both": forward(self_products=3, tokens=81), "text": text,
                "whole": forward() + text}
    assert found == expected


def test_the_counts_of_sd15():
    """The figures that the papers' readers know: 0.80 TFLOP a row, 15 % more under ISA; 46 MB a step are kept."""
    assert arithmetic.forward() + arithmetic.text_keys_values() == pytest.approx(803.3e9, rel=1e-3)
    assert arithmetic.forward(self_products=2) / arithmetic.forward() == pytest.approx(1.153, abs=1e-3)
    assert arithmetic.kept() == pytest.approx(46.2e6, rel=1e-3)


def fused(q, k, v, site=None):
    """What a fused kernel holds: its output, and no N × M scores."""
    return torch.empty_like(q)


@pytest.mark.parametrize("config, side, device, kernel",
                         [(UNetConfig(), 64, "meta", fused), (SMALL, 16, "cpu", attend)], ids=["SD1.5", "small"])
def test_the_peak_of_a_forward_is_the_closed_form(config, side, device, kernel):
    """The same under every attention, for any number of rows, within 1 %: the time embedding is left out."""
    with torch.device(device):
        unet = UNet(config).requires_grad_(False)
        z, context, store = torch.randn(2, 4, side, side), torch.randn(1, 77, config.context_dim), {}
        kv = unet.keys_values(context)
        unet(z[:1], 1, kv, capture(store, kernel))
        row, kept = (f(config, side, itemsize=4) for f in (arithmetic.activations, arithmetic.kept))
        replayed = isa(store, kernel=kernel)
        for f in (kernel, replayed, blend(kernel, replayed, 0.7), capture({}, kernel)):
            keeps = "capture" in f.__qualname__
            with LiveBytes() as live:
                unet(z, 1, kv, f)
            assert live.peak == pytest.approx(2 * (row + keeps * kept), rel=0.01)


@pytest.mark.parametrize("mix, rows", [("attention", 2), ("noise", 4)])
@pytest.mark.parametrize("n", [1, 4])
def test_the_peak_of_a_job_is_the_closed_form(mix, rows, n):
    """On the CPU: where the replay has more rows than a step, and where fewer; the rest is latents and text."""
    model = tiny_model(torch.float32)
    ref = isadca.invert(model, Image.new("RGB", (64, 64), "gray"), steps=12, size=64)
    run = isadca.Run("a lemon", isadca.Method(mix=mix, init="shuffle"), tuple(range(n)))
    with LiveBytes() as live:
        isadca.sample(model, ref, [run])
    expected = arithmetic.memory(n * rows, True, model.unet.config, side=32, itemsize=4)
    assert live.peak == pytest.approx(expected, rel=0.05)


def test_the_page_has_the_table_that_the_script_prints(capsys):
    arithmetic.main()
    page = (ROOT / "examples" / "benchmark" / "README.md").read_text(encoding="utf-8")
    for line in filter(None, capsys.readouterr().out.splitlines()):
        assert line in page, line
