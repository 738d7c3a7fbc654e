"""Every published layout is recognised, renamed and fits at full size. The files are sparse: right headers, no data.

What a wrong file is told is in test_bad_weights.py, what loading gives in test_loading.py.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from keyfiles import Listing, cast, ldm_pairs, listing, only, renamed, write_sparse

from isadca.common.problem import Problem
from isadca.app import inspect
from isadca.loading import checkpoints, load as loading, original
from isadca.loading.known_encoders import KNOWN_ENCODERS
from isadca.loading.layouts import Part
from isadca.networks.clip import CLIPText, CLIPVision
from isadca.networks.unet import UNet
from isadca.networks.vae import VAE

UNET, TEXT = listing("sd15_diffusers_unet"), listing("sd15_diffusers_text_encoder")
VAE_OLD, VAE_NEW = listing("sd15_diffusers_vae_old_names"), listing("sd15_diffusers_vae_new_names")
LDM = listing("sd15_single_file_ldm_emaonly")
VIT_H, BIG_G = listing("image_encoder_vit_h"), listing("image_encoder_vit_bigG")
POSITIONS = "text_model.embeddings.position_ids"
LDM_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")


def names(part: Part) -> dict[str, str]:
    return {ours: stored.name for ours, stored in part.tensors.items()}


def without(tensors: Listing, *suffixes: str) -> Listing:
    return {key: v for key, v in tensors.items() if not key.endswith(suffixes)}


FINE_TUNE = {key: v for key, v in cast(LDM, "F16").items() if key.startswith(LDM_PREFIXES)}
EMA = {"model_ema." + key.removeprefix("model.").replace(".", ""): v for key, v in LDM.items()
       if key.startswith("model.diffusion_model.")}
EXTRAS = {"control_model.input_blocks.0.0.weight": ("F32", (320, 4, 3, 3)),
          "control_model.input_hint_block.0.weight": ("F32", (16, 3, 3, 3)),
          "embedding_manager.embedder.weight": ("F32", (4, 768)),
          "cond_stage_model.model.logit_scale": ("F32", ()),
          "cond_stage_model.model.text_projection": ("F32", (768, 768)),
          "first_stage_model.loss.logvar": ("F32", ())}
BARE_VAE = only(LDM, "first_stage_model.") | {"model_ema.decay": ("F32", ()), "model_ema.num_updates": ("I32", ())}
SINGLE = {"unet": "LDM single file", "vae": "LDM single file", "text": "LDM single file"}
IN_SINGLE = "cond_stage_model.transformer."

# what is published -> (the file's tensors, how many, the layout of each part it holds)
PUBLISHED = {
    "unet fp32": (UNET, 686, {"unet": "diffusers"}),
    "unet fp16": (cast(UNET, "F16"), 686, {"unet": "diffusers"}),
    "vae fp32": (VAE_OLD, 248, {"vae": "diffusers, old attention names"}),
    "vae fp16": (VAE_NEW, 248, {"vae": "diffusers"}),
    "text fp32": (TEXT, 197, {"text": "transformers"}),
    "text fp16": (cast(TEXT, "F16"), 197, {"text": "transformers"}),
    "text saved again": (without(TEXT, "position_ids"), 196, {"text": "transformers"}),
    "text, float positions": (TEXT | {POSITIONS: ("F32", (1, 77))}, 197, {"text": "transformers"}),
    "text without text_model.": (renamed(TEXT, "text_model.", ""), 197,
                                 {"text": "transformers, without text_model."}),
    "v1-5-pruned-emaonly": (LDM, 1145, SINGLE),
    "v1-5-pruned": (LDM | EMA, 1831, SINGLE),
    "fine-tune fp16": (FINE_TUNE, 1131, SINGLE),
    "fine-tune without positions": (without(FINE_TUNE, "position_ids"), 1130, SINGLE),
    "old merge": (renamed(LDM, IN_SINGLE + "text_model.", IN_SINGLE), 1145,
                  SINGLE | {"text": "LDM single file, old names"}),
    "vae. prefix": (renamed(LDM, "first_stage_model.", "vae."), 1145, SINGLE | {"vae": "LDM"}),
    "with extras": (LDM | EXTRAS, 1151, SINGLE),
    "vae-ft-mse": (BARE_VAE, 250, {"vae": "LDM"}),
    "bare LDM unet": (only(LDM, "model.diffusion_model."), 686, {"unet": "LDM"}),
    "diffusers unet, LDM vae": (UNET | renamed(BARE_VAE, "", "vae."), 936, {"unet": "diffusers", "vae": "LDM"}),
    "ip-adapter base, light": (listing("ip-adapter_sd15"), 36, {"ip_adapter": "h94"}),
    "ip-adapter vit-G": (listing("ip-adapter_sd15_vit-G"), 36, {"ip_adapter": "h94"}),
    "ip-adapter plus, plus-face": (listing("ip-adapter-plus_sd15"), 83, {"ip_adapter": "h94"}),
    "ip-adapter full-face": (listing("ip-adapter-full-face_sd15"), 38, {"ip_adapter": "h94"}),
    "image encoder ViT-H": (VIT_H, 521, {"vision": "transformers"}),
    "image encoder ViT-bigG": (BIG_G, 777, {"vision": "transformers"}),
}


@cache
def expected_shapes(kind: str, width: int = 0) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of our own network at its published size."""
    make = {"unet": UNet, "vae": VAE, "text": CLIPText,
            "vision": lambda: CLIPVision(KNOWN_ENCODERS[width])}[kind]
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in make().state_dict().items()}


def expected_of(part: Part) -> dict[str, tuple[int, ...]]:
    if part.kind == "ip_adapter":  # its sizes are read off the file
        return {key: tuple(tensor.shape) for key, tensor in loading.build(part).state_dict().items()}
    return expected_shapes(part.kind, part.shapes.get("vision_model.pre_layrnorm.weight", (0,))[0])


@pytest.mark.parametrize("name, metadata, residue, size", [
    ("ip-adapter_sd15", None, 0, 44_642_768),
    ("ip-adapter_sd15_vit-G", None, 0, 46_215_640),
    ("ip-adapter-plus_sd15", None, 0, 98_183_288),
    ("ip-adapter-full-face_sd15", None, 0, 43_592_352),
    ("sd15_single_file_ldm_emaonly", {"format": "pt"}, None, 4_265_146_304),
    ("sd15_diffusers_vae_old_names", {"format": "pt"}, None, 334_643_276),
    ("sd15_diffusers_vae_new_names", {"format": "pt"}, 0, 167_335_342)])
def test_the_listings_are_the_published_files_to_the_byte(tmp_path, name, metadata, residue, size):
    """Guards the fixtures: a file with these keys, types and shapes has exactly the published size."""
    assert write_sparse(tmp_path / "x.safetensors", listing(name), metadata, residue).stat().st_size == size


@pytest.mark.parametrize("kind, count", [("unet", 859_520_964), ("vae", 83_653_863), ("text", 123_060_480)])
def test_networks_have_the_published_number_of_weights(kind, count):
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(kind).values()) == count


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_file_is_recognised_and_fits(tmp_path, published):
    """Kind and layout of every part; strict fit at full size; and nothing of a published part is left behind."""
    tensors, count, layouts = PUBLISHED[published]
    assert len(tensors) == count
    parts = checkpoints.recognise(write_sparse(tmp_path / "x.safetensors", tensors))
    assert {kind: part.layout for kind, part in parts.items()} == layouts
    for part in parts.values():
        expected = expected_of(part)
        checkpoints.check_names(expected, part)
        assert part.shapes.keys() == expected.keys()
        assert all(stored[2:] == tensors[stored.name][::-1] for stored in part.tensors.values())
    left = tensors.keys() - {stored.name for part in parts.values() for stored in part.tensors.values()}
    known = ("position_ids", ".decay", ".num_updates", *[key for key in LDM if not key.startswith(LDM_PREFIXES)])
    assert not [key for key in left - EMA.keys() - EXTRAS.keys() if not key.endswith(known)]


@pytest.mark.parametrize("published", ["v1-5-pruned", "vae-ft-mse", "ip-adapter plus, plus-face",
                                       "image encoder ViT-H", "image encoder ViT-bigG", "unet fp16"])
def test_parts_of_a_file_without_a_config_builds_the_published_size(tmp_path, published):
    """parts_of builds the network itself, without memory: SD1.5's sizes, or the image encoder's from its width."""
    tensors, _, layouts = PUBLISHED[published]
    parts = inspect.parts_of(write_sparse(tmp_path / "x.safetensors", tensors))
    assert [part.kind for part in parts] == list(layouts)
    assert all(tensor.is_meta for part in parts[:1] for tensor in loading.build(part).state_dict().values())


def test_image_encoder_is_found_in_a_file_of_both_clip_encoders(tmp_path):
    """OpenCLIP's own repositories keep both in one file; only the image half is taken."""
    text = {key: ("F32", tuple(1024 if n == 768 else n for n in shape)) for key, (_, shape) in TEXT.items()}
    rest = {"logit_scale": ("F32", ()), "text_projection.weight": ("F32", (1024, 1024))}
    part = loading.find_part(write_sparse(tmp_path / "x.safetensors", VIT_H | text | rest), "vision", torch.float32)
    checkpoints.check_names(expected_shapes("vision", 1280), part)
    assert len(part.tensors) == len(VIT_H) - 1  # all but the position numbers


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "modelspec.title": "a\nb"}])
@pytest.mark.parametrize("residue", [None, 0, 1, 2, 4])
def test_header_may_be_unaligned_and_metadata_absent(tmp_path, metadata, residue):
    tensors = listing("ip-adapter_sd15")
    header = checkpoints.read_header(write_sparse(tmp_path / "x.safetensors", tensors, metadata, residue))
    assert {key: stored[:1:-1] for key, stored in header.tensors.items()} == tensors
    assert header.metadata == (metadata or {})


@pytest.mark.parametrize("dtype, fits", [("F16", True), ("BF16", True), ("F32", True), ("F64", True),
                                         ("I64", False)])
def test_any_float_fits_and_nothing_else(tmp_path, dtype, fits):
    part = checkpoints.recognise(write_sparse(tmp_path / "x.safetensors", cast(VAE_NEW, dtype)))["vae"]
    shapes = {key: shape for key, (_, shape) in VAE_NEW.items()}
    if fits:
        return checkpoints.check_names(shapes, part)
    with pytest.raises(Problem, match=f" is {dtype}, expected F16, BF16, F32, F64"):
        checkpoints.check_names(shapes, part)


def test_order_of_the_keys_in_the_file_does_not_matter(tmp_path):
    forward = checkpoints.recognise(write_sparse(tmp_path / "a.safetensors", LDM))
    backward = checkpoints.recognise(write_sparse(tmp_path / "b.safetensors", dict(reversed(LDM.items()))))
    assert [(kind, names(part)) for kind, part in forward.items()] == [(kind, names(part)) for kind, part in
                                                                       backward.items()]


@pytest.mark.parametrize("kind, prefix, rules", [
    ("unet", "model.diffusion_model.", original.UNET_RULES), ("vae", "first_stage_model.", original.VAE_RULES),
    ("text", "cond_stage_model.transformer.", original.TEXT_RULES)])
def test_rules_give_every_pair_of_the_independent_map(kind, prefix, rules):
    """map_ldm_to_diffusers.tsv was made from diffusers' conversion code, not from our rules."""
    pairs = ldm_pairs(kind)
    assert len(pairs) == {"unet": 686, "vae": 248, "text": 197}[kind]
    assert {key: checkpoints.rename(key.removeprefix(prefix), rules) for key in pairs} == pairs


def test_single_file_parts_are_the_independent_map(tmp_path):
    for part in checkpoints.recognise(write_sparse(tmp_path / "x.safetensors", LDM)).values():
        pairs = {ours: ldm for ldm, ours in ldm_pairs(part.kind).items() if not ours.endswith("position_ids")}
        assert names(part) == pairs


def test_old_vae_names_become_the_new_ones():
    assert VAE_OLD.keys() != VAE_NEW.keys()
    renames = {key: checkpoints.rename(key, original.VAE_RULES) for key in VAE_OLD}
    assert {renames[key]: shape for key, (_, shape) in VAE_OLD.items()} == {k: s for k, (_, s) in VAE_NEW.items()}
    assert sorted(new for old, new in renames.items() if old != new) == sorted(
        f"{side}.mid_block.attentions.0.{to}.{what}" for side in ("encoder", "decoder")
        for to in ("to_q", "to_k", "to_v", "to_out.0") for what in ("weight", "bias"))


@pytest.mark.parametrize("rules, names", [(original.UNET_RULES, UNET), (original.VAE_RULES, VAE_NEW),
                                          (original.TEXT_RULES, TEXT)])
def test_rules_leave_names_alone_that_are_right_already(rules, names):
    assert [checkpoints.rename(key, rules) for key in names] == list(names)


def changed(tensors: Listing, change: str, key: str) -> Listing:
    dtype, shape = tensors[key]
    if change == "missing":
        return {k: v for k, v in tensors.items() if k != key}
    return tensors | ({key + "_2": (dtype, shape)} if change == "unexpected" else {key: (dtype, (7, *shape))})


# kind -> (file, its layout, a key of it, that key here)
DAMAGED = {
    "unet": (LDM, "LDM single file", "model.diffusion_model.output_blocks.5.0.in_layers.2.weight",
             "up_blocks.1.resnets.2.conv1.weight"),
    "unet, diffusers": (UNET, "diffusers", "mid_block.resnets.0.conv1.weight", None),
    "vae": (BARE_VAE, "LDM", "decoder.up.1.block.2.conv1.weight", "decoder.up_blocks.2.resnets.2.conv1.weight"),
    "vae, old": (VAE_OLD, "diffusers, old attention names", "decoder.mid_block.attentions.0.proj_attn.weight",
                 "decoder.mid_block.attentions.0.to_out.0.weight"),
    "text": (TEXT, "transformers", "text_model.encoder.layers.3.mlp.fc1.weight", None),
    "vision": (VIT_H, "transformers", "vision_model.encoder.layers.31.mlp.fc2.bias", None),
    "ip_adapter": (listing("ip-adapter_sd15"), "h94", "image_proj.proj.bias", None),
}


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_file_is_explained_in_one_line(tmp_path, monkeypatch, damaged, change):
    """File, kind, layout, what is wrong with which key under both of its names, and what to look at."""
    tensors, layout, theirs, ours = DAMAGED[damaged]
    monkeypatch.chdir(tmp_path)  # a message is cut where paths are long
    path = write_sparse(Path("some model.safetensors"), changed(tensors, change, theirs))
    with pytest.raises(Problem) as caught:
        inspect.parts_of(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: {damaged.split(',')[0]} (layout: {layout}) does not fit: ")
    assert f"1 {change}: {ours or theirs}" in text and "Is it complete" in text
    if ours and change != "missing":
        assert f"(from {theirs}" in text
    if change == "misshapen":
        assert f"is [7, {str(list(tensors[theirs][1]))[1:]}, expected {list(tensors[theirs][1])}" in text
    others = {"missing", "unexpected", "misshapen"} - {change}
    assert not any(f"{other}:" in text for other in others)


def test_many_damages_are_counted_and_three_are_named(tmp_path):
    fewer = {key: v for key, v in UNET.items() if not key.startswith("up_blocks.")}
    with pytest.raises(Problem, match=r"384 missing: (up_blocks\.\S+, ){3}\.{4} Is it"):
        inspect.parts_of(write_sparse(tmp_path / "x.safetensors", fewer))
