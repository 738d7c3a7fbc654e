"""The convolutions that a CPU computes as matrix products."""

import pytest
import torch
import torch.nn.functional as F
from twins import assert_near

from isadca.networks.cpu_conv import SmallGridConv2d, speed_up_convolutions
from isadca.networks.sizes import UNetConfig
from isadca.networks.unet import UNet


@pytest.mark.parametrize("rows, stride, as_product", [(1, 1, True), (2, 1, True), (3, 1, False), (3, 2, True)])
def test_a_large_weight_on_a_small_grid_is_a_matrix_product_with_the_same_result(monkeypatch, rows, stride, as_product):
    conv = torch.nn.Conv2d(1024, 512, 3, padding=1, stride=stride).double()
    speed_up_convolutions(conv)
    x = torch.randn(rows, 1024, 8, 7 if stride == 1 else 9, dtype=torch.float64)
    asked, unfold = [], F.unfold
    monkeypatch.setattr(F, "unfold", lambda *args, **kw: asked.append(1) or unfold(*args, **kw))
    assert_near(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1, stride=stride), 1e-12)
    assert len(asked) == as_product


def test_only_large_3x3_convolutions_are_sped_up():
    """All of them are the 1280-wide ones; a weight that is small is faster in oneDNN's own way."""
    with torch.device("meta"):
        sd15 = UNet(UNetConfig())
    fast = {name: conv for name, conv in sd15.named_modules() if isinstance(conv, SmallGridConv2d)}
    assert {conv.kernel_size for conv in fast.values()} == {(3, 3)}
    assert min(conv.out_channels for conv in fast.values()) >= 640
    assert "mid_block.resnets.0.conv1" in fast and "down_blocks.2.downsamplers.0.conv" in fast
    assert not any(name.startswith(("down_blocks.0", "up_blocks.3")) for name in fast)
