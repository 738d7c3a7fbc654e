"""What holds for every file of examples/methods, and what the seam gives to them."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from gallery import FILES, NAMES, load, method_of

import isadca
from isadca.loop import Run, sample


# ---- what the seam gives them ----------------------------------------------------------------------------------

def test_ref_qk_is_the_reference_s_own_pass(tiny, tiny_ref):
    """Queries and keys of every layer, cross-attention too, at each step; nothing where no method asks."""
    given = []

    def mix(controls):
        given.append(controls.ref_qk)
        return controls.kernel
    for asks in (False, True):
        sample(tiny, tiny_ref, [Run("a lemon", isadca.Method(mix=mix, ref_maps=asks))])
    assert given[:6] == [{}] * 6 and set(given[6]) == {site.name for site in tiny.unet.sites}
    own = {}

    def kernel(q, k, v, site):
        own[site.name] = q, k
        return isadca.attend(q, k, v, site)
    last = tiny.schedule.steps(6)[-1].t
    tiny.noise(tiny_ref.chain[1:2], last, tiny.context([""]), kernel)
    for name, pair in given[-1].items():
        for ours, theirs in zip(pair, own[name]):
            torch.testing.assert_close(ours, theirs)


def test_what_a_run_keeps_is_its_own(tiny, tiny_ref):
    seen = []

    def mix(controls):
        seen.append(dict(controls.conditions.kept))
        controls.conditions.kept[controls.conditions.words[0][0]] = controls.i
        return controls.kernel
    method = isadca.Method(mix=mix)
    sample(tiny, tiny_ref, [Run("lemon", method), Run("tulip", method)])
    assert seen[:4] == [{}, {}, {"lemon": 0}, {"tulip": 0}]


# ---- every file ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_short_and_says_where_it_is_from(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    doc = load(path.stem).__doc__
    assert ("arXiv" in doc and "authors' code: " in doc) or "no paper: " in doc
    assert f"examples/methods/{path.name}:{path.stem.upper()}" in doc
    tests = "".join(test.read_text(encoding="utf-8") for test in Path(__file__).parent.glob("test_methods*.py"))
    assert f"def test_{path.stem}(" in tests, "its equation is not tested"


@pytest.mark.parametrize("name", NAMES)
def test_a_method_runs_and_changes_the_picture(name, tiny, tiny_ref):
    """Through the real Controls, with two variations; where guidance is 1, too."""
    method = method_of(load(name))
    seeds = (0, 1) if not method.deterministic else (0,)
    layers = method.layers and (-1, -2)  # this UNet has fewer
    for guidance in (method.guidance, 1) if name != "nag" else (method.guidance,):
        own = replace(method, guidance=guidance, layers=layers)
        plain = replace(own, mix=lambda controls: controls.kernel, edit=None, before_step=None)
        ours, theirs = sample(tiny, tiny_ref, [Run("a lemon", own, seeds), Run("a lemon", plain, seeds)])
        assert ours.isfinite().all() and ours.shape == theirs.shape
        assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_command_of_the_docstring_runs(path, tmp_path, monkeypatch):
    doc = load(path.stem).__doc__.replace("\\\n", " ")
    [command] = [line.strip() for line in doc.splitlines() if line.strip().startswith("isadca vary")]
    words = shlex.split(command)[1:]
    monkeypatch.chdir(ROOT)
    for flag in ("-o", "--grid"):
        if flag in words:
            words[words.index(flag) + 1] = str(tmp_path / words[words.index(flag) + 1])
    from isadca.app.cli import main
    assert not main([*words, "--steps", "4", "--quiet"])
    assert list(tmp_path.glob("*.png"))
