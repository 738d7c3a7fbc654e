"""The metrics as `isadca evaluate` runs them: with the demo's metric networks, and against transformers' CLIP."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DEMO
from keyfiles import listing, write_sparse
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizerFast

from isadca.common.images import clip_pixels, to_tensor
from isadca.common.problem import Problem
from isadca.evaluation.judge import METRICS, Judge, load_clip, metric_lacks
from isadca.evaluation.metrics import load_metric, lpips
from isadca.loading.known_encoders import KNOWN_ENCODERS
from isadca.networks.sizes import CLIPTextConfig

FOLDER = DEMO / "metrics"


@pytest.fixture(scope="module")
def scores():
    return Judge(tuple(METRICS), FOLDER)


def test_clip_numbers_equal_transformers(scores, cat):
    """One file with both halves, and its config.json, as OpenAI's are published."""
    theirs = CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizerFast.from_pretrained(FOLDER / "clip")
    other = cat.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def cosine(*embeds):
        return torch.cosine_similarity(*embeds).item()

    with torch.no_grad():
        a, b = (theirs.visual_projection(theirs.vision_model(clip_pixels(p, 64)).pooler_output) for p in (cat, other))
        text, caption = (theirs.text_projection(theirs.text_model(**tokenizer(
            t, return_tensors="pt", padding="max_length", max_length=32)).pooler_output)
            for t in ("a cat", "A photo depicts a cat"))
    found = scores(cat, other, "a cat")
    assert found["clip-i"] == pytest.approx(cosine(a, b), abs=1e-5)
    assert found["clip-t"] == pytest.approx(cosine(a, text), abs=1e-5)
    assert found["clipscore"] == pytest.approx(2.5 * max(cosine(a, caption), 0), abs=1e-5)


def test_the_demos_clip_tells_pictures_apart(scores, cat):
    assert max(("a cat", "a rocket", "a lemon"), key=lambda t: scores(cat, cat, t)["clip-t"]) == "a cat"


def test_equal_pictures(scores, cat):
    found = scores(cat, cat, "a cat")
    assert [found[name] for name in ("lpips-alex", "lpips-vgg")] == [0, 0]
    assert [found[name] for name in ("ssim", "ssim-luma", "clip-i")] == pytest.approx([1, 1, 1])
    assert found["sifid"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in METRICS if name.startswith(("lpips", "ssim", "sifid"))])
def test_every_distance_grows_with_the_damage(scores, cat, name):
    found = [scores(cat.filter(ImageFilter.GaussianBlur(r)), cat, "")[name] for r in (0.6, 1.5, 4)]
    assert found == sorted(found, reverse=METRICS[name][1])


def test_lpips_reads_its_own_files(scores, cat):
    blurred = cat.filter(ImageFilter.GaussianBlur(2))
    trunk, heads = (load_metric(FOLDER / f"{name}.safetensors", kind)
                    for name, kind in (("vgg", "vgg"), ("lpips-vgg", "vgg heads")))
    expected = lpips(to_tensor(blurred), to_tensor(cat), "vgg", trunk, heads).item()
    assert scores(blurred, cat, "")["lpips-vgg"] == pytest.approx(expected)
    assert all((w >= 0).all() for w in heads.values())


def test_only_what_is_asked_for(cat):
    assert list(Judge(("ssim", "clip-i"), FOLDER)(cat, cat, "x")) == ["ssim", "clip-i"]


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(Problem, match="inception.safetensors: no such file, which the metric sifid needs"):
        Judge(("ssim", "sifid"), tmp_path)
    with pytest.raises(Problem, match="metric is 'fid', expected one of lpips-alex"):
        Judge(("fid",), FOLDER)
    assert [name for name in METRICS if not metric_lacks(name, tmp_path)] == ["ssim", "ssim-luma"]
    assert "clip: no such file" in metric_lacks("clip-t", tmp_path)
    assert not any(metric_lacks(name, FOLDER) for name in METRICS)


def test_a_clip_without_texts_or_of_two_spaces(tmp_path):
    """The image half alone is no judge of texts; nor is one whose halves were projected apart."""
    tensors = load_file(FOLDER / "clip" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k.startswith("vis")}, tmp_path / "model.safetensors")
    with pytest.raises(Problem, match="holds vision, expected text"):
        load_clip(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != "text_projection.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(Problem, match="not embedded in one space.*clip-vit-large-patch14"):
        load_clip(tmp_path)
    config = json.loads((FOLDER / "clip" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": 64}))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Problem, match=r"projection.*\[128, 128\], expected \[64, 128\]"):
        load_clip(tmp_path)


def test_a_clip_without_a_vocabulary_has_openais(tmp_path):
    """With 49,408 tokens: the published repositories may be fetched without their tokenizer files."""
    config = json.loads((FOLDER / "clip" / "config.json").read_text())
    config["text_config"] |= {"vocab_size": 49408, "max_position_embeddings": 77}
    tensors = load_file(FOLDER / "clip" / "model.safetensors")
    tensors["text_model.embeddings.token_embedding.weight"] = torch.zeros(49408, 128)
    tensors["text_model.embeddings.position_embedding.weight"] = torch.zeros(77, 128)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"logit_scale": torch.tensor(4.6)}, tmp_path / "model.safetensors")
    assert load_clip(tmp_path).tokenizer(["a cat"])[0, :4].tolist() == [49406, 320, 2368, 49407]
    assert np.isfinite(load_clip(tmp_path).vision(torch.zeros(1, 3, 64, 64))[0]).all()


def test_a_clips_own_vocabulary_is_read_from_either_file_and_has_to_fit(tmp_path):
    """tokenizer.json, too; a vocabulary that is larger than the text encoder's table is refused before it is read."""
    folder = tmp_path / "clip"
    shutil.copytree(DEMO / "metrics/clip", folder)
    words = load_clip(folder).tokenizer
    words._bpe.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    assert torch.equal(load_clip(folder).tokenizer(["a cat"]), words(["a cat"]))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Problem, match="a vocabulary of 49408 tokens, the text encoder has 7"):
        load_clip(folder)


def whole_clip(text: str, vision: str, joint: int) -> dict:
    """The published halves as one file."""
    halves = listing(text) | listing(vision)
    width = halves["text_model.final_layer_norm.weight"][1][0]
    return halves | {"text_projection.weight": ("F32", (joint, width))}


def test_openais_clip_loads_without_its_config(tmp_path):
    """ViT-L/14, from the published key lists of its halves: the text half is SD1.5's, projected."""
    tensors = whole_clip("sd15_diffusers_text_encoder", "image_encoder_vit_l14_lambda", 768)
    write_sparse(tmp_path / "model.safetensors", tensors)
    clip = load_clip(tmp_path)
    assert clip.text.config == CLIPTextConfig(projection_dim=768) and clip.vision.config == KNOWN_ENCODERS[1024]


def test_another_clip_without_its_config_is_refused(tmp_path):
    """OpenCLIP's ViT-H has heads of 80, which its shapes do not tell; it was loaded with heads of 64."""
    tensors = whole_clip("sd15_diffusers_text_encoder", "image_encoder_vit_h", 1024)
    wide = {key: (dtype, tuple(1024 if n == 768 else n for n in shape)) if key.startswith("text") else (dtype, shape)
            for key, (dtype, shape) in tensors.items()}
    write_sparse(tmp_path / "model.safetensors", wide)
    with pytest.raises(Problem, match="model.safetensors"):
        load_clip(tmp_path)
