"""A folder of results holds one experiment, and damage to it is mended or named."""

import csv
import json
import math
import os
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from hypothesis import given, settings, strategies as st
from PIL import Image

from isadca.app import cli
from isadca.common.problem import Problem
from isadca.evaluation import processes
from isadca.evaluation.run import describe
from isadca.evaluation.pairs import Pair, read_pairs
from isadca.evaluation.report import to_csv
from isadca.evaluation.results_folder import Item, check_settings
from isadca.evaluation.systems import SYSTEMS

CAT = DEMO / "references" / "cat.png"
ITEM = Item(0, Pair(CAT, "a lemon"), SYSTEMS["isadca"], 0)
ARGS = ["evaluate", "-q", "pairs", "-o", "results", "--systems", "rival", "--metrics", "ssim", "--steps", "1"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """One pair and one system, made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    shutil.copy(CAT, tmp_path / "pairs")
    (tmp_path / "pairs" / "pairs.csv").write_text("reference,prompt\ncat.png,a lemon\n")
    assert cli.main(ARGS) == 0
    return tmp_path / "results"


# ---- one experiment ------------------------------------------------------------------------------------------------

def changed(model):
    """What a later run may have otherwise, and the word for it."""
    yield "ip_adapter weights", replace(model, files={k: v for k, v in model.files.items() if k != "ip_adapter"}), 50, 1
    yield "unet weights", replace(model, files=model.files | {"unet": model.files["vae"]}), 50, 1
    yield "dtype", replace(model, dtype=torch.bfloat16), 50, 1
    yield "device", replace(model, device=torch.device("meta")), 50, 1
    yield "steps", model, 49, 1
    yield "ranks", model, 50, 2
    config = replace(model.schedule.config, beta_end=0.013)
    yield "scheduler", replace(model, schedule=type(model.schedule)(config)), 50, 1


def test_what_changed_is_named(demo, tmp_path):
    """The adapter, a dtype, a scheduler or a number of processes: none was noticed before."""
    begun = describe(demo, [ITEM.pair], 50, 1)
    check_settings(tmp_path, begun, {"a": "1"})
    check_settings(tmp_path, begun, {"b": "2"})  # other systems may come later
    for word, model, steps, ranks in changed(demo):
        with pytest.raises(Problem, match=f"begun with other .*{word}.*choose another -o"):
            check_settings(tmp_path, describe(model, [ITEM.pair], steps, ranks), {})
    for word, value in [("pairs", "x"), ("vocabulary", "x"), ("unet config", "x"), ("CPU threads", 99), ("new key", 1)]:
        with pytest.raises(Problem, match=f"begun with other {word};"):
            check_settings(tmp_path, begun | {word: value}, {})
    with pytest.raises(Problem, match="begun with other b;"):
        check_settings(tmp_path, begun, {"a": "1", "b": "3"})


def test_a_config_that_changed_is_another_experiment(demo):
    """Not the files are compared but what was read from them."""
    config = replace(demo.unet.config, norm_groups=4)
    begun = describe(demo, [ITEM.pair], 50, 1)
    before, demo.unet.config = demo.unet.config, config
    try:
        assert {key for key, value in describe(demo, [ITEM.pair], 50, 1).items() if begun[key] != value} == {
            "unet config"}
    finally:
        demo.unet.config = before


# ---- damage --------------------------------------------------------------------------------------------------------

BAD_JSON = ["", "[", "[]", "null", '"x"', "3", "NaN", "[" * 10**5, '{"a": ' * 10**5, '{"seconds": NaN}',
            '{"seconds": []}', '{"seconds": 1e999}', '{"seconds": "1"}', '{"seconds": true}',
            '{"seconds": 1, "ssim": null}', '{"seconds": 1, "made_by": 3}']


def test_damaged_results_are_made_again(results, capsys):
    """A deleted picture, one of another size, a torn one, and numbers that are none."""
    picture, numbers = results / "pictures/0000/rival-0.png", results / "pictures/0000/rival-0.json"
    whole, table = picture.read_bytes(), csv.reader((results / "results.csv").open())
    table = [row[:-1] for row in table]  # but for the seconds
    small = Image.new("RGB", (8, 8))

    def spoil():
        yield picture.unlink
        yield lambda: small.save(picture)
        yield lambda: picture.write_bytes(whole[:200])
        yield lambda: numbers.write_bytes(b"\xff")
        yield lambda: numbers.write_text(BAD_JSON[9])
    for damage in spoil():
        damage()
        assert cli.main(ARGS) == 0
        assert picture.read_bytes() == whole
        assert [row[:-1] for row in csv.reader((results / "results.csv").open())] == table


@pytest.mark.parametrize("text", BAD_JSON)
def test_damaged_numbers_are_no_numbers(text, tmp_path):
    path = ITEM.picture(tmp_path).with_suffix(".json")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert ITEM.numbers(tmp_path) == {}


@pytest.mark.parametrize("text", [*BAD_JSON[:9], "{}", '{"settings": []}', '{"settings": {}, "extras": 3}',
                                  '{"pairs": "x", "steps": 50}'])
def test_damaged_settings_are_one_line(text, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(Problem, match="settings.json: is damaged, or of another version of isadca; choose another -o"):
        check_settings(tmp_path, {"steps": 50}, {})


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                          ["settings", "extras", "steps", "seconds", "reference", "prompt", "a"]), inner, max_size=4),
                      max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(values)
def test_any_json_is_read_or_refused(value):
    """As settings, as an item's numbers, and as a list of pairs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = json.dumps(value)
        for path in (folder / "settings.json", folder / "pairs.json", ITEM.picture(folder).with_suffix(".json")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        numbers = ITEM.numbers(folder)
        assert all(math.isfinite(value) for value in numbers.values())
        for read in (lambda: check_settings(folder, {"steps": 50}, {}), lambda: read_pairs(folder)):
            try:
                read()
            except Problem as problem:
                assert len(str(problem).replace(str(folder), "")) <= 300


CELLS = st.sampled_from(["reference", "prompt", "cat.png", "a lemon", '"', ",", "\n", "\r", "\0", "\ufeff", "é", "=1",
                         "x" * 140_000])


@settings(max_examples=150, deadline=None)
@given(st.lists(CELLS, max_size=12), st.booleans())
def test_any_csv_is_read_or_refused(cells, with_heads):
    with tempfile.TemporaryDirectory() as name:
        os.symlink(CAT, Path(name, "cat.png"))
        Path(name, "pairs.csv").write_text("reference,prompt\n" * with_heads + "".join(cells), newline="")
        try:
            assert all(isinstance(pair.prompt, str) for pair in read_pairs(name))
        except Problem as problem:
            assert len(str(problem).replace(name, "")) <= 300


@pytest.mark.parametrize("name, data, message", [
    ("pairs.csv", b"reference,prompt\ncat.png," + b"x" * 140_000, "not a list of pairs .field larger than"),
    ("pairs.csv", b"reference,prompt\ncat.png,\xff\n", "not a list of pairs .*utf-8"),
    ("pairs.json", b'[{"reference": "cat.png", "prompt": "\\ud800"}]', "not a list of pairs .*surrogates"),
    ("pairs.json", b"[" * 10**5, "not a list of pairs"),
    ("pairs.json", b'[{"reference": "a\\u0000b", "prompt": "x"}]', "null")])
def test_pairs_that_are_no_text(name, data, message, tmp_path):
    shutil.copy(CAT, tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Problem, match=message):
        read_pairs(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pairs.csv")
    with pytest.raises(Problem, match="pairs.csv: no such file"):
        read_pairs(tmp_path / "pairs.csv")


def test_a_forged_folder_is_not_waited_for_nor_followed(results, tmp_path, capsys):
    """Pipes, links that lead out, and inputs among the outputs."""
    numbers, elsewhere = results / "pictures/0000/rival-0.json", tmp_path / "elsewhere"
    numbers.unlink()
    os.mkfifo(numbers)
    assert ITEM._replace(system=SYSTEMS["rival"]).numbers(results) == {}
    shutil.move(results / "pictures/0000", elsewhere)
    (elsewhere / "reference.png").write_text("mine")
    (results / "pictures/0000").symlink_to(elsewhere)
    assert cli.main(ARGS) == 2 and "0000: is a link that leads out of results" in capsys.readouterr().err
    assert (elsewhere / "reference.png").read_text() == "mine"
    for pairs in ("results/results.csv", "results/pairs.csv"):
        Path(pairs).write_text("reference,prompt\n../pairs/cat.png,a lemon\n")
        assert cli.main([*ARGS[:2], pairs, *ARGS[3:]]) == 2 and "could be replaced" in capsys.readouterr().err


# ---- what is written -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_runs_no_formula(prompt):
    item = ITEM._replace(pair=Pair(CAT, prompt))
    [row] = csv.DictReader(to_csv({item: {"ssim": -0.5, "seconds": 1.0}}, ("ssim",)).splitlines())
    assert row["prompt"] == "'" + prompt and row["ssim"] == "-0.5"


def test_names_that_are_no_text(results, tmp_path, capsys):
    """They were found at the end of every run, after all work."""
    odd = tmp_path / os.fsdecode(b"pairs\xff")
    shutil.copytree(tmp_path / "pairs", odd)
    shutil.move(odd / "cat.png", odd / os.fsdecode(b"c\xff.png"))
    (odd / "pairs.csv").unlink()
    (odd / "pairs.json").write_text(json.dumps([{"reference": os.fsdecode(b"c\xff.png"), "prompt": "a lemon"}]))
    assert cli.main([*ARGS[:2], str(odd), *ARGS[3:]]) == 0
    assert r"c\udcff.png" in (results / "results.csv").read_text()


# ---- processes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rank, ranks, message", [
    ("x", "2", "RANK 'x'"), ("", "2", "RANK ''"), ("-1", "2", "RANK '-1'"), ("²", "2", "RANK '²'"),
    ("0", "0", "expected a number below another"), ("2", "2", "RANK '2' of WORLD_SIZE '2'"),
    ("0", "1e3", "WORLD_SIZE '1e3'"), ("0", "9" * 5000, "WORLD_SIZE '9999"),
    ("0", "2", "do not find each other .*torchrun")])
def test_ranks_that_are_nonsense(rank, ranks, message, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(Problem, match=message) as caught:
        processes.join()
    assert len(str(caught.value)) <= 300


def test_a_host_that_does_not_exist_is_not_waited_for(monkeypatch):
    """gloo tries for five minutes."""
    def unknown(host, port):
        raise socket.gaierror(-2, f"{host} not known")
    for name, value in [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "no.such.host"), ("MASTER_PORT", "29500")]:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Problem, match="do not find each other .*no.such.host not known.*; start all of them"):
        processes.join()
