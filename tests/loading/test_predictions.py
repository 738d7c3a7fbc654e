"""Where a file may say that its model predicts v, and what it may say instead."""

import pytest
from keyfiles import listing, told, write_sparse

from isadca.loading.checkpoints import recognise

LDM, VAE = listing("sd15_single_file_ldm_emaonly"), listing("sd15_diffusers_vae_new_names")


@pytest.mark.parametrize("key, value", [
    ("modelspec.prediction_type", "eps"), ("modelspec.prediction_type", "EPSILON"),
    ("ss_v_parameterization", "None"), ("ss_zero_terminal_snr", "None"), ("ss_zero_terminal_snr", "false")])
def test_metadata_that_says_noise(tmp_path, key, value):
    path = write_sparse(tmp_path / "x.safetensors", LDM, {"format": "pt", key: value})
    assert set(recognise(path)) == {"unet", "vae", "text"}


def test_only_a_unet_predicts(tmp_path):
    """A VAE that was taken from such a model is a VAE."""
    path = write_sparse(tmp_path / "x.safetensors", VAE, {"format": "pt", "modelspec.prediction_type": "v"})
    assert set(recognise(path)) == {"vae"}


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_yaml_is_read_to_its_end_and_in_any_encoding(tmp_path, suffix):
    path = write_sparse(tmp_path / "x.safetensors", LDM)
    text = "# caf\xe9\n".encode("latin-1") * 100 + b"model:\n  params:\n    parameterization: v\n"
    path.with_suffix(suffix).write_bytes(text)
    told(lambda: recognise(path), path, "predicts v", f"x{suffix}", "; use a plain")
