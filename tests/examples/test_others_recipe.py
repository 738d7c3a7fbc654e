"""The recipe of the demo's other systems and metric networks, train_others.py, without its hours: what its
networks are called, that they start where they should, and what is shipped."""

import importlib
import sys

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from isadca.evaluation.metrics import inception_map, load_metric, taps, trunk_keys

sys.path.insert(0, str(ROOT / "examples" / "train_demo"))
metrics = importlib.import_module("demo_metrics")
world = importlib.import_module("demo_world")
sys.path.pop(0)


def test_inception_has_torchvisions_names():
    names = {name for name in metrics.Inception().state_dict() if not name.startswith("heads.")}
    assert {name for name in names if "num_batches" not in name} == set(trunk_keys("inception"))


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_a_trunk_with_its_normalisations_taken_in_is_the_same_function(kind):
    """In torchvision's layout, which has none, and which LPIPS reads."""
    net, x = metrics.Trunk(kind), torch.randn(4, 3, 64, 64)
    for norm in net.norms.values():
        torch.nn.init.uniform_(norm.weight, 0.5, 2), torch.nn.init.normal_(norm.bias)
    net(x), net(2 * x + 1)  # statistics that are neither 0 nor 1
    folded = net.eval().fold()
    assert set(folded) == set(trunk_keys(kind))
    theirs = metrics.answers(net.heads, taps(metrics.scaled(x), kind, folded)[-1])
    for name, logits in net(x).items():
        torch.testing.assert_close(theirs[name], logits, rtol=1e-4, atol=1e-4)


def test_the_inception_that_is_trained_is_the_one_that_sifid_reads():
    """In eval mode, layer by layer the same map; the trained module normalises by itself."""
    net = metrics.Inception().eval()
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean), torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    x, seen = torch.randn(2, 3, 64, 64), []
    net.heads = torch.nn.ModuleDict()
    hook = net.Conv2d_4a_3x3["bn"].register_forward_hook(lambda module, args, out: seen.append(out.relu()))
    net(x)
    hook.remove()
    torch.testing.assert_close(inception_map(x, net.state_dict()), seen[0])


def test_heads_never_weigh_below_zero():
    trunk = load_metric(DEMO / "metrics" / "alex.safetensors", "alex")
    heads = metrics.Heads("alex", trunk)
    with torch.no_grad():
        for raw in heads.raw:
            raw.sub_(0.5)
    weights = heads.weights()
    assert set(weights) == set(trunk_keys("alex heads")) and all((w >= 0).all() for w in weights.values())
    assert [w.shape[1] for w in weights.values()] == [
        f.shape[1] for f in taps(torch.zeros(1, 3, 64, 64), "alex", trunk)]


@pytest.mark.parametrize("how", [*metrics.DISTORTIONS, *metrics.UNSEEN])
def test_a_stronger_distortion_is_farther(how):
    """What the heads are taught is true to begin with: the mean error grows."""
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (8, 3, 64, 64))).float()
    x = torch.nn.functional.avg_pool2d(x, 9, 1, 4) * 6  # smooth, as pictures are
    errors = []
    for strength in (0.05, 0.5, 1.0):
        torch.manual_seed(0)
        errors.append(((metrics.DISTORTIONS | metrics.UNSEEN)[how](x, strength) - x).abs().mean().item())
    assert errors[0] < errors[1] < errors[2]


def test_no_kind_of_distortion_is_both_taught_and_asked():
    assert not set(metrics.DISTORTIONS) & set(metrics.UNSEEN)


def test_what_is_shipped_has_half_precision():
    for path in DEMO.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}, path


def test_the_image_variation_unet_is_not_the_demos(demo):
    theirs = load_file(DEMO / "image-variations/unet/diffusion_pytorch_model.safetensors")
    ours = demo.unet.state_dict()
    assert theirs.keys() == ours.keys()
    assert any((theirs[key].float() - ours[key]).abs().max() > 1e-3 for key in ours)
