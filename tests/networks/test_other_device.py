"""A device that is not the CPU, without one: torch's "meta" stands for a GPU.

A tensor there has a device, a dtype and a shape, and no values. An operation with a tensor that was left on the CPU
raises, and so does everything that a GPU would have to be waited for: `.item()`, `bool()`, `.cpu()`. Two such waits
are wanted and replaced here: the flag that a Watch reads after its loop, and the final picture.
"""

from dataclasses import replace

import kandinsky_prior as prior
import pytest
import torch
from conftest import DEMO, ROOT, tiny_model
from controlnet_shuffle import ControlNet, restyle
from image_variations import vary_image
from PIL import Image

import isadca
from isadca import loop, reference
from isadca.app.own_code import load_own
from isadca.evaluation.judge import load_clip
from isadca.evaluation.metrics import clip_score, inception_map, load_metric, lpips
from isadca.loading.load import vae_dtype
from isadca.networks.clip import CLIPText
from isadca.networks.model import Model, Watch
from isadca.networks.sizes import CLIPTextConfig

METRICS = DEMO / "metrics"
PICTURE = Image.new("RGB", (16, 16), "gray")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture
def waits(monkeypatch):
    """The two places where the device is waited for, in the order in which they were come by."""
    seen: list[str] = []

    def done(self):
        assert all(flag.device.type == "meta" for _, flag in self.flags)
        seen.append(self.stage)
        self.flags.clear()

    def to_images(x):
        assert x.device.type == "meta" and x.shape[1] == 3
        seen.append("picture")
        return [PICTURE] * len(x)
    monkeypatch.setattr(Watch, "done", done)
    for module in (loop, reference):
        monkeypatch.setattr(module, "to_images", to_images)
    return seen


def there(dtype: torch.dtype) -> Model:
    """The tiny model on the other device, the VAE in the dtype that loading gives it."""
    model = tiny_model(torch.float32)
    for network in (model.unet, model.text, model.vision, model.ip_adapter):
        network.to("meta", dtype)
    model.vae.to("meta", vae_dtype(dtype))
    return replace(model, device=torch.device("meta"), dtype=dtype)


MIXES = {name: method for name, method in isadca.PRESETS.items()} | {
    "isadca, attention mix": replace(isadca.PRESETS["isadca"], mix="attention"),
    "unguided, renewed in part": replace(isadca.PRESETS["isadca"], guidance=1.0, diversity=0.3),
    "gaussian start": replace(isadca.PRESETS["isadca"], init="gaussian")}


@DTYPES
@pytest.mark.parametrize("method", MIXES.values(), ids=MIXES)
def test_the_main_job_stays_on_its_device(waits, method, dtype):
    model = there(dtype)
    ref = isadca.invert(model, PICTURE, steps=4)
    assert (ref.chain.device.type, ref.chain.dtype) == ("meta", torch.float32)
    assert waits == ["encoding", "inverting"]
    waits.clear()
    pictures = isadca.vary(model, ref, "a lemon", method, seeds=(0, 1))
    assert len(pictures) == 2
    assert waits == ["sampling"] + ["decoding", "picture"] * 2  # no wait in the loop


@DTYPES
def test_masks_more_references_and_the_way_back_stay_there(waits, dtype):
    model = there(dtype)
    ref = isadca.invert(model, PICTURE, steps=3, fixed_point=1)
    half = torch.tensor([[0.0] * 4 + [1.0] * 4] * 8)
    isadca.vary(model, ref, "a lemon", also=[ref], mask=half, keep=1 - half)
    isadca.vary(model, ref, "a lemon", mix="attention", mask=half, replayed=list(isadca.replay(model, ref)))
    isadca.reconstruct(model, ref)
    model.noise(ref.chain[:1], 500, model.context(["a"]), edit=lambda h, place: 1.2 * h)


GALLERY = [path for path in sorted((ROOT / "examples" / "methods").glob("*.py"))
           if f"\n{path.stem.upper()} = " in path.read_text(encoding="utf-8")]


@DTYPES
@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_the_gallerys_methods_stay_there(waits, path, dtype):
    model = there(dtype)
    ref = isadca.invert(model, PICTURE, steps=3)
    method, _ = load_own(f"{path}:{path.stem.upper()}", "--method")
    waits.clear()
    isadca.vary(model, ref, "a lemon", method, seeds=(0, 1))
    assert waits == ["sampling"] + ["decoding", "picture"] * 2


@DTYPES
def test_controlnet_stays_there(waits, dtype):
    model = there(dtype)
    net = ControlNet(model.unet.config, (4, 6)).to("meta", dtype).requires_grad_(False)
    restyle(model, net, PICTURE, "a lemon", steps=3)
    assert waits[-2:] == ["decoding", "picture"]


@DTYPES
def test_image_variations_stay_there(waits, dtype):
    model = there(dtype)
    config = replace(model.vision.config, projection_dim=model.unet.config.context_dim)
    vision = type(model.vision)(config).to("meta", dtype).requires_grad_(False)
    assert len(vary_image(replace(model, vision=vision), PICTURE, steps=3, seeds=(0, 1))) == 2


@DTYPES
def test_the_prior_stays_there(waits, dtype):
    model = there(dtype)
    net = prior.Prior(prior.PriorConfig(20, 2, 8, 2, 12)).to("meta", dtype).requires_grad_(False)
    encoder = CLIPText(CLIPTextConfig(772, 20, 2, 2, 48, 12, projection_dim=20)).to("meta", dtype).requires_grad_(False)
    embed = prior.embed_prompt(net, encoder, model.tokenizer, "a lemon", steps=3)
    assert (embed.device.type, embed.dtype) == ("meta", dtype)
    assert model.image_tokens(embeds=embed).shape == (2, 4, 24)


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_stays_there(kind):
    trunk, heads = (load_metric(METRICS / f"{name}.safetensors", what, "meta")
                    for name, what in ((kind, kind), (f"lpips-{kind}", f"{kind} heads")))
    distance = lpips(*torch.empty(2, 2, 3, 64, 64, device="meta"), kind, trunk, heads)
    assert (distance.device.type, distance.shape, distance.dtype) == ("meta", (2,), torch.float32)


def test_the_other_metrics_networks_stay_there():
    """SSIM and SIFID's statistics are computed on the CPU, as float64 is not everywhere; the networks are not."""
    found = inception_map(torch.empty(2, 3, 64, 64, device="meta"), load_metric(METRICS / "inception.safetensors",
                                                                                 "inception", "meta"))
    assert found.device.type == "meta" and found.ndim == 4
    clip = load_clip(METRICS / "clip", "meta")
    for embedded in (clip.embed_text("a lemon"), clip.embed_picture(PICTURE)):
        assert embedded.device.type == "meta" and len(embedded) == 1
    assert clip_score(embedded, embedded).device.type == "meta"


FAULTS = {
    "a mask left on the CPU": lambda z: z * torch.ones(z.shape[-2:]),
    "another dtype in a product": lambda z: z.flatten(2) @ torch.ones(z[0, 0].numel(), 1, device="meta").double(),
    "a value read": lambda z: z * z.mean().item(),
    "a decision on a value": lambda z: z if z.sum() > 0 else -z,
    "a detour by the CPU": lambda z: z.cpu().to(z.device)}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(waits, monkeypatch, fault):
    """Each in the one place that every step passes."""
    model, noise = there(torch.float16), Model.noise
    ref = isadca.invert(model, PICTURE, steps=2)
    monkeypatch.setattr(Model, "noise", lambda *args, **options: fault(noise(*args, **options)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        isadca.vary(model, ref, "a lemon")
