"""The explorable page's data: what it shows is what the library computes, and its file is safe and small."""

import base64
import importlib
import inspect
import json
import os
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from house import cited, claims

import isadca
from isadca import Method
from isadca.app import explore
from isadca.app.cli import main
from isadca.common.images import clip_pixels, to_tensor
from isadca.ddim import predict_x0
from isadca.evaluation.metrics import clip_similarity, ssim
from isadca.loop import Run, decode, sample

TEMPLATE = (ROOT / "isadca" / "app" / "explore.html").read_text(encoding="utf-8")
STEPS, LAM = 4, 0.6
ROCKET = ROOT / "examples" / "rocket.png"


@pytest.fixture(scope="module")
def ref(demo):
    return isadca.invert(demo, isadca.load_image(ROCKET), STEPS)


@pytest.fixture(scope="module")
def data(demo, ref):
    """As the page's script reads it."""
    text = explore.page(explore.look_inside(demo, ref, "a lemon", explore.method_at(LAM)))
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def pixels(source) -> np.ndarray:
    """A data: URI or a picture."""
    if isinstance(source, str):
        source = Image.open(BytesIO(base64.b64decode(source.partition(",")[2])))
    return np.asarray(source).astype(int)


def unpacked(text: str, n: int) -> np.ndarray:
    """Bytes -> rows of n weights, their sum 1."""
    rows = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, n).astype(float) ** 2
    return rows / rows.sum(1, keepdims=True)


# ---- equal to the library --------------------------------------------------------------------------------------

@pytest.mark.parametrize("mix, i", [("noise", 0), ("noise", 3), ("attention", 3), ("attention", 10)])
def test_the_pictures_over_lam_and_their_numbers(demo, ref, data, mix, i):
    lam = data["lams"][i]
    [picture] = isadca.vary(demo, ref, "a lemon", Method(lam=lam, mix=mix))
    shown = data["mixes"][mix]
    assert abs(pixels(shown["pictures"][i]) - pixels(picture)).max() <= 1
    assert shown["distance"][i] == pytest.approx(1 - ssim(to_tensor(picture), to_tensor(ref.image)).item(), abs=2e-3)
    text = explore.paired_text(demo).embed(demo.tokenizer(["a lemon"]))
    image = demo.vision(clip_pixels(picture, demo.vision.config.image_size))[0]
    assert data["similarity"] == "prompt"
    assert shown["similarity"][i] == pytest.approx(clip_similarity(image, text).item(), abs=2e-3)


def test_each_lam_is_there(data):
    assert data["lams"] == pytest.approx(np.linspace(0, 1, 11))
    assert all(len(values) == 11 for mix in data["mixes"].values() for values in mix.values())


def test_other_methods_stand_beside_lam_and_change_nothing(demo, ref, data):
    masactrl = isadca.PRESETS["masactrl"]
    shown = explore.over_lam(demo, ref, "a lemon", lambda items, label: items, [masactrl])
    assert shown["beside"]["names"] == ["masactrl"]
    [picture] = isadca.vary(demo, ref, "a lemon", masactrl)
    assert abs(pixels(shown["beside"]["pictures"][0]) - pixels(picture)).max() <= 1
    assert shown["mixes"]["noise"]["distance"] == pytest.approx(data["mixes"]["noise"]["distance"], abs=2e-3)


def test_the_clean_pictures_of_every_step(demo, ref, data):
    expected = {"isa": [], "dca": [], "mixed": []}

    def on_step(run, t, z, noise):
        for name, eps in noise._asdict().items():
            expected[name] += decode(demo, predict_x0(z, eps, demo.schedule.alpha_bar(t)))
    [z] = sample(demo, ref, [Run("a lemon", Method(lam=LAM))], on_step=on_step)
    assert data["times"] == [t for t, _ in demo.schedule.steps(STEPS)]
    for name, pictures in expected.items():
        assert abs(np.array([pixels(u) for u in data["x0"][name]]) - np.array([*map(pixels, pictures)])).max() <= 1
    assert abs(pixels(data["variation"]) - pixels(decode(demo, z)[0])).max() <= 1


def test_the_strip(demo, ref, data):
    assert (pixels(data["reference"]) == pixels(ref.image)).all()
    assert abs(pixels(data["reconstruction"]) - pixels(isadca.reconstruct(demo, ref))).max() <= 1
    grid = [t for t, _ in demo.schedule.steps(STEPS)]
    assert [link["t"] for link in data["chain"]] == grid[::-1]
    for level, link in enumerate(data["chain"], 1):
        assert abs(pixels(link["picture"]) - pixels(decode(demo, ref.chain[[level]])[0])).max() <= 1


@pytest.fixture(scope="module")
def by_hand(demo, ref):
    """The first step's attention, computed outside the loop: both branches' text rows, layer by layer."""
    t = demo.schedule.steps(STEPS)[0].t
    seen = next(isadca.replay(demo, ref))
    looks, words = {}, {}

    def kernel(q, k, v, site):
        if site.kind == "self" and k.shape[2] == 2 * q.shape[2]:
            looks[site.layer] = isadca.attention_probs(q, k)[0].mean(0)
        if site.kind == "cross" and k.shape[2] == 32:
            words.setdefault(site.layer, []).append(isadca.attention_probs(q, k)[0].mean(0))
        return isadca.attend(q, k, v, site)
    context, image = demo.context(["a lemon"]), demo.image_tokens(ref.image)[1:]
    demo.noise(ref.chain[-1:], t, context, isadca.isa(seen.kv, kernel=kernel))
    demo.noise(ref.chain[-1:], t, context, isadca.dca(
        demo.ip_adapter.keys_values(image, demo.unet.sites, demo.unet.config.n_heads), kernel=kernel))
    return looks, words


def test_attention_is_that_of_the_step(data, by_hand):
    looks, words = by_hand
    first = data["attention"][0]
    assert first["t"] == data["times"][0]
    assert [level["hw"] for level in first["levels"]] == [[16, 16], [8, 8], [4, 4]] == [
        level["grid"] for level in first["levels"]]
    for level in first["levels"]:
        n = level["hw"][0] * level["hw"][1]
        layers = [layer for layer, p in looks.items() if len(p) == n]
        whole = torch.stack([looks[layer] for layer in layers]).mean(0)
        np.testing.assert_allclose(unpacked(level["looks"], 2 * n), whole, atol=0.01 * whole.max())
        lemon = torch.stack([p for layer in layers for p in words[layer]]).mean(0)[:, 2]
        np.testing.assert_allclose(unpacked(level["words"], n)[1], lemon / lemon.sum(), atol=0.01 * lemon.max())
    shares = {layer: p[:, : len(p)].sum(1).mean().item() for layer, p in looks.items()}
    assert {layer["layer"]: layer["share"] for layer in first["layers"]} == pytest.approx(shares, abs=1e-3)


def test_each_step_has_its_own_attention(demo, ref, data):
    """The last step's word map at 8 × 8: three layers, two branches, nothing of the steps before."""
    seen = []

    def kernel(q, k, v, site):
        if site.kind == "cross" and k.shape[2] == 32 and site.hw == (8, 8):
            seen.append(isadca.attention_probs(q[-1:], k[-1:])[0].mean(0)[:, 2])
        return isadca.attend(q, k, v, site)
    sample(demo, ref, [Run("a lemon", Method(lam=LAM))], replayed=isadca.replay(demo, ref), kernel=kernel)
    assert len(seen) == 6 * STEPS
    lemon = torch.stack(seen[-6:]).mean(0)
    shown = unpacked(data["attention"][-1]["levels"][1]["words"], 64)[1]
    np.testing.assert_allclose(shown, lemon / lemon.sum(), atol=0.001)


def test_recording_does_not_change_the_picture(demo, ref, data):
    [picture] = isadca.vary(demo, ref, "a lemon", Method(lam=LAM))
    assert abs(pixels(data["variation"]) - pixels(picture)).max() <= 1


# ---- maps ------------------------------------------------------------------------------------------------------

def test_large_maps_are_averaged_over_queries_and_summed_over_keys():
    p = torch.rand(1024, 2048, dtype=torch.float64).softmax(1)
    blocks = p.view(16, 2, 16, 2, 2, 16, 2, 16, 2)  # query row, column; half; key row, column; each 16 of 2
    expected = blocks.mean((1, 3)).sum((4, 6)).reshape(256, 512)
    torch.testing.assert_close(explore.pooled_both(p, (32, 32)), expected)
    small = torch.rand(12, 24).softmax(1)
    torch.testing.assert_close(explore.pooled_both(small, (3, 4)), small)


def test_packing_keeps_small_weights_apart():
    row = torch.tensor([[1.0, 0.5, 0.01, 0.001, 0.0]])
    restored = (np.frombuffer(base64.b64decode(explore.packed(row)), np.uint8) / 255.0) ** 2
    np.testing.assert_allclose(restored, row[0], rtol=0.05)


# ---- the file --------------------------------------------------------------------------------------------------

def test_no_prompt_can_break_out_of_the_script_element(demo, ref):
    prompt = "</script><script>alert(1)</script><!-- \u2028 \"'& 🍋"
    data = {"prompt": prompt, "words": [word for word, _ in demo.tokenizer.words(prompt)]}
    text = explore.page(data)
    embedded = text[text.index('id="data">') + len('id="data">'):]
    assert json.loads(embedded[: embedded.index("</script>")]) == data
    assert text.count("<script") == TEMPLATE.count("<script") and text.count("<!--") == TEMPLATE.count("<!--")


def test_the_page_asks_nobody_for_anything():
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w+", TEMPLATE) == []
    assert re.findall(r"\b(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttp|import\(", TEMPLATE.split("<script>")[0]) == []
    assert "default-src 'none'" in TEMPLATE
    assert TEMPLATE.count("{{data}}") == 1


def test_each_panel_names_its_equation_and_a_function_that_exists():
    blocks = re.findall(r'<p class="eq".*?</p>', TEMPLATE, re.DOTALL)
    assert all("<code>" in block for block in blocks)
    sections = TEMPLATE.split("<section")[1:]
    assert len(sections) == 4 and all('class="eq"' in section for section in sections)
    for name in re.findall(r"<code>([\w.]+)</code>", TEMPLATE):
        module, function = name.rsplit(".", 1)
        assert inspect.isfunction(getattr(importlib.import_module(f"isadca.{module}"), function)), name
    for block in blocks:
        functions = set(re.findall(r"<code>([\w.]+)</code>", block))
        for number in cited(block) & {3, 4, 5, 8, 10}:  # Eqs. 6 and 9 have a second function each
            assert claims()[number][0] in functions, block


# ---- the command -----------------------------------------------------------------------------------------------

@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = main([*map(str, argv)])
        return code, *capsys.readouterr()
    return run


def test_the_command_writes_one_file_and_says_which(cli):
    assert cli("explore", ROCKET, "", "-o", "page.html", "--steps", 2, "-q") == (0, "page.html\n", "")
    assert os.listdir() == ["page.html"]
    data = json.loads(re.search(r'id="data">(.*?)</script>', open("page.html", encoding="utf-8").read())[1])
    assert (data["times"], data["words"], data["lam"]) == ([501, 1], [], 0.7)


def test_a_method_of_ones_own_is_shown_and_code_is_linked_only_within_a_clone(cli):
    with open("mine.py", "w") as file:
        file.write("def idea(controls):\n    return controls.kernel\n")
    assert cli("explore", ROCKET, "a cat", "-o", "p.html", "--steps", 1, "-q", "--method", "mine.py:idea")[0] == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', open("p.html", encoding="utf-8").read())[1])
    assert data["beside"]["names"] == ["rival-edit", "masactrl", "ip-adapter", "idea"]
    assert data["code"] == ""
    committed = (ROOT / "examples" / "explore.html").read_text(encoding="utf-8")
    assert '"code": "../isadca"' in committed


def test_what_is_kept_is_kept_at_every_lam_and_shown(cli):
    Image.fromarray(np.repeat([[255, 0]], 32, 1).repeat(64, 0).astype(np.uint8)).save("left.png")
    for flags in ([], ["--keep", "left.png"]):
        assert cli("explore", ROCKET, "a lemon", "-o", "p.html", "--steps", 2, "-q", *flags)[0] == 0
        data = json.loads(re.search(r'id="data">(.*?)</script>', open("p.html", encoding="utf-8").read())[1])
        pictures = [np.array(Image.open(BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)
                    for uri in (data["reference"], *data["mixes"]["noise"]["pictures"], data["variation"])]
        left, right = ([abs(other[:, half] - pictures[0][:, half]).mean() for other in pictures[1:]]
                       for half in (slice(0, 24), slice(40, 64)))
        assert (max(left) < 0.6 * min(right)) == bool(flags)
    kept = np.frombuffer(base64.b64decode(data["keep"]), np.uint8).reshape(16, 16)
    assert (kept[:, :8] == 255).all() and (kept[:, 8:] == 0).all()


def test_without_an_adapter_there_is_a_page_still(cli):
    code, _, err = cli("explore", ROCKET, "a lemon", "-o", "p.html", "--steps", 1, "-q", "--ip-adapter", "none")
    assert code == 0 and "no IP-Adapter" in err
    data = json.loads(re.search(r'id="data">(.*?)</script>', open("p.html", encoding="utf-8").read())[1])
    assert data["similarity"] == "" and data["mixes"]["noise"]["similarity"] is None
    assert len(data["attention"]) == len(data["chain"]) == 1


def test_without_the_text_encoder_s_pair_the_reference_is_compared_with(demo, ref, monkeypatch):
    monkeypatch.setattr(explore, "paired_text", lambda model: None)
    label, similar = explore.similarity(demo, ref, "a lemon")
    assert label == "reference" and similar(ref.image) == 1


def test_a_saved_reference_keeps_its_steps(cli):
    cli("invert", ROCKET, "-o", "rocket.safetensors", "--steps", 1, "-q")
    assert cli("explore", "rocket.safetensors", "a lemon", "-o", "page.html", "-q")[0] == 0
    assert '"times": [1]' in open("page.html", encoding="utf-8").read()


@pytest.mark.parametrize("argv, says", [
    (["-o", "page.png"], "page.png: expected a name that ends in .html"),
    (["-o", "no/such/page.html"], "the folder no/such does not exist"),
    (["-o", "page.html", "--lam", "1"], "lam is 1.0, expected more than 0 and less than 1"),
    (["-o", "page.html", "--lam", "nan"], "lam is nan"),
    (["-o", "page.html", "--lam", "most"], "argument --lam: invalid float value: 'most'"),
    (["-o", "page.html", "--steps", "0"], "steps is 0, expected 1 to 999"),
    (["-o", "page.html", "--method", "no.py:idea"], "no.py"),
    ([], "-o"),
])
def test_bad_input_is_one_line(cli, argv, says):
    code, out, err = cli("explore", ROCKET, "a lemon", "-q", *argv)
    assert (code, out, err.count("\n"), os.listdir()) == (2, "", 1, [])
    assert says in err


def test_the_committed_page_is_of_the_current_template():
    file = ROOT / "examples" / "explore.html"
    assert 500_000 < file.stat().st_size < 3_000_000
    text = file.read_text(encoding="utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert text == TEMPLATE.replace("{{data}}", data)
