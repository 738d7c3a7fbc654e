"""SSIM and SIFID are computed in float64 on the CPU, wherever the pictures are: Apple's GPUs have no float64."""

import pytest
import torch
from conftest import DEMO
from torch.overrides import TorchFunctionMode

from isadca.evaluation.metrics import load_metric, sifid, ssim


class WithoutDouble(TorchFunctionMode):
    """A device on which nothing becomes float64: only what `cpu()` gave may. Counts what did."""

    def __init__(self):
        super().__init__()
        self.on_cpu, self.doubled = [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.Tensor.cpu:
            self.on_cpu.append(result)
        if function is torch.Tensor.double:
            assert any(args[0] is tensor for tensor in self.on_cpu), "float64 on the device"
            self.doubled += 1
        return result


@pytest.mark.parametrize("name", ["ssim", "sifid"])
def test_float64_is_on_the_cpu(name):
    a, b = torch.rand(2, 1, 3, 64, 64).unbind(0)
    inception = load_metric(DEMO / "metrics/inception.safetensors", "inception")
    with torch.no_grad(), WithoutDouble() as device:
        ssim(a, b) if name == "ssim" else sifid(a, b, inception=inception)
    assert device.doubled == 2
