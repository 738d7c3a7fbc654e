"""`isadca evaluate`: its pairs, resuming, shards, and that the tables say what the files hold."""

import csv
import json
import os
import shutil
import subprocess
import sys
from statistics import mean, stdev

import numpy as np
import pytest
from conftest import DEMO, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from isadca.app import cli
from isadca.common.problem import Problem
from isadca.evaluation.pairs import Pair, read_pairs
from isadca.evaluation.report import over_pairs, overhead, spread, to_markdown
from isadca.evaluation.results_folder import Item
from isadca.evaluation.run import list_items
from isadca.evaluation.systems import SYSTEMS

DREAMBOOTH = """Classes

subject_name,class
bear_plushie,stuffed animal
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""
COUNTERPARTS = ROOT / "examples" / "counterparts"
FEW = ["--systems", f"isadca-attention,ip-adapter,{COUNTERPARTS}/image_variations.py:SYSTEM",
       "--metrics", "ssim,clip-i,clip-t", "--steps", "2"]


@pytest.fixture
def pairs(tmp_path):
    """Three pairs of two references."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("cat", "pig"):
        shutil.copy(DEMO / "references" / f"{name}.png", folder)
    (folder / "pairs.csv").write_text("reference,prompt\ncat.png,a lemon\ncat.png,\"a house, on the left\"\n"
                                      "pig.png,a tree\n")
    return folder


def run(*args) -> None:
    assert cli.main(["evaluate", "-q", *map(str, args)]) == 0


def rows(results) -> list[dict]:
    return list(csv.DictReader((results / "results.csv").read_text().splitlines()))


def without_seconds(results) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(results)]


# ---- pairs -------------------------------------------------------------------------------------------------------

def test_pairs_of_every_format(pairs):
    from_csv = read_pairs(pairs)
    assert [(p.reference.name, p.prompt) for p in from_csv][1] == ("cat.png", "a house, on the left")
    assert read_pairs(pairs / "pairs.csv") == from_csv
    (pairs / "pairs.json").write_text(json.dumps([{"reference": p.reference.name, "prompt": p.prompt}
                                                  for p in from_csv]))
    assert read_pairs(pairs / "pairs.json") == from_csv


def test_dreambooth(tmp_path):
    """First picture of each subject; prompts by kind; without the token that nobody taught the model."""
    for subject, name in (("bear_plushie", "01"), ("bear_plushie", "00"), ("cat2", "03")):
        (tmp_path / "dataset" / subject).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "dataset" / subject / f"{name}.jpg")
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(DREAMBOOTH)
    found = [(p.reference.relative_to(tmp_path).as_posix(), p.prompt) for p in read_pairs(tmp_path)]
    assert found == [("dataset/bear_plushie/00.jpg", "a stuffed animal in the jungle"),
                     ("dataset/bear_plushie/00.jpg", "a red stuffed animal"),
                     ("dataset/cat2/03.jpg", "a cat wearing a red hat")]
    shutil.rmtree(tmp_path / "dataset" / "cat2")
    with pytest.raises(Problem, match="cat2/00.jpg: no such picture"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("name, text, message", [
    ("pairs.csv", "picture,text\na,b\n", "pairs.csv: not a list of pairs .*reference,prompt"),
    ("pairs.csv", "reference,prompt\n", "pairs.csv: holds no pairs"),
    ("pairs.csv", "reference,prompt\nnone.png,a cat\n", "none.png: no such picture"),
    ("pairs.csv", "reference,prompt\ncat.png\n", "not a list of pairs"),
    ("pairs.json", "{\"reference\": 1}", "pairs.json: not a list of pairs"),
    ("pairs.json", "[", "pairs.json: not a list of pairs"),
    ("prompts_and_classes.txt", "subject_name,class\n", "prompts_and_classes.txt: not a list of pairs"),
    ("notes.txt", "", "has no pairs.csv, no pairs.json and no prompts_and_classes.txt")])
def test_bad_pairs_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(Problem, match=message):
        read_pairs(tmp_path)


def test_a_system_that_ignores_the_seed_makes_one_picture():
    items = list_items([Pair(ROOT, "a"), Pair(ROOT, "b")], (SYSTEMS["isadca"], SYSTEMS["ip-adapter"]), (3, 4))
    assert [(i.index, i.system.name, i.seed) for i in items] == [
        (0, "isadca", 3), (0, "ip-adapter", 3), (0, "ip-adapter", 4),
        (1, "isadca", 3), (1, "ip-adapter", 3), (1, "ip-adapter", 4)]


# ---- runs --------------------------------------------------------------------------------------------------------

def test_a_run_writes_everything_and_goes_on_where_it_stopped(pairs, tmp_path, capsys):
    results = tmp_path / "results"
    run(pairs, "-o", results, *FEW, "--seeds", "0,7")
    assert capsys.readouterr().out.splitlines() == [str(results / n) for n in ("results.csv", "table.md", "fig3.png")]
    assert len(rows(results)) == 3 * 5  # one of the three systems is deterministic
    assert all((results / "pictures" / f"{i:04d}" / "reference.png").exists() for i in range(3))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in results.rglob("*-*.*")}
    gone = results / "pictures" / "0001" / "ip-adapter-7"
    gone.with_suffix(".json").unlink(), gone.with_suffix(".png").unlink()
    unmeasured = results / "pictures" / "0002" / "ip-adapter-7.json"
    unmeasured.write_text(json.dumps({"seconds": 3.0, "made_by": json.loads(unmeasured.read_text())["made_by"]}))
    run(pairs, "-o", results, *FEW, "--seeds", "0,7")
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in results.rglob("*-*.*")}
    changed = {path for path in before if before[path][0] != after[path][0]}
    assert changed == {gone.with_suffix(".json"), gone.with_suffix(".png"), unmeasured}
    assert before[gone.with_suffix(".png")][1] == after[gone.with_suffix(".png")][1]
    assert json.loads(unmeasured.read_text())["seconds"] == 3.0  # the picture was there: measured, not made again


def test_results_of_another_experiment_are_left_alone(pairs, tmp_path, capsys):
    results = tmp_path / "results"
    run(pairs, "-o", results, *FEW)
    before = (results / "results.csv").read_bytes()
    (pairs / "pairs.csv").write_text("reference,prompt\ncat.png,a pear\n")
    assert cli.main(["evaluate", "-q", str(pairs), "-o", str(results), *FEW[:-1], "3"]) == 2
    assert "results: was begun with other pairs, steps; choose another -o" in capsys.readouterr().err
    assert (results / "results.csv").read_bytes() == before


def test_the_other_systems_weights_belong_to_the_experiment(pairs, tmp_path, capsys):
    """Pictures of one ControlNet are not taken for those of another."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for item in DEMO.iterdir():
        (weights / item.name).symlink_to(item)
    (weights / "controlnet-shuffle").unlink()
    shutil.copytree(DEMO / "controlnet-shuffle", weights / "controlnet-shuffle")
    args = [pairs, "-o", tmp_path / "results", "--weights", weights, "--systems",
            f"{COUNTERPARTS}/controlnet_shuffle.py:SYSTEM",
            "--metrics", "ssim", "--steps", "1"]
    run(*args)
    file = weights / "controlnet-shuffle" / "diffusion_pytorch_model.safetensors"
    save_file({key: x + 1 for key, x in load_file(file).items()}, file)
    assert cli.main(["evaluate", "-q", *map(str, args)]) == 2
    assert "begun with other weights/controlnet-shuffle/diffusion" in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [
    (["--systems", "dalle"], "system is 'dalle'"), (["--metrics", "fid"], "metric is 'fid'"),
    (["--seeds", "0,x"], "--seeds: 'x', expected 0 to"), (["--steps", "0"], "steps is 0")])
def test_flags_are_checked_before_anything_is_written(pairs, tmp_path, capsys, args, message):
    assert cli.main(["evaluate", "-q", str(pairs), "-o", str(tmp_path / "results"), *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_two_processes_write_what_one_writes(pairs, tmp_path):
    """torchrun with gloo: shards by pair, merged by the first."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    args = ["-m", "isadca", "evaluate", "-q", str(pairs), *FEW, "-o"]
    subprocess.run([sys.executable, *args, str(tmp_path / "one")], check=True, env=env, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           *args, str(tmp_path / "two")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3  # one of them reports
    assert without_seconds(tmp_path / "two") == without_seconds(tmp_path / "one")
    for path in (tmp_path / "one").rglob("*.png"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert np.array_equal(np.asarray(Image.open(other)), np.asarray(Image.open(path))), path


# ---- the tables --------------------------------------------------------------------------------------------------

NUMBERS = {Item(i, Pair(ROOT / f"{i % 2}.png", "p"), SYSTEMS[system], seed): {"ssim": s, "sifid": 1 - s, "seconds": t}
           for i, system, seed, s, t in [(0, "rival", 0, .2, 4.0), (0, "rival", 1, .4, 2.0), (1, "rival", 0, .5, 3.0),
                                         (0, "isadca", 0, .6, 6.0), (1, "isadca", 0, .8, 3.0)]}


def test_a_pair_is_one_sample_whatever_its_seeds():
    middle, error = over_pairs(NUMBERS, SYSTEMS["rival"], "ssim")
    assert middle == pytest.approx(mean([.3, .5])) and error == pytest.approx(stdev([.3, .5]) / 2**0.5)


def test_the_table_has_ours_and_the_papers(capsys):
    head, _, rival, ours = to_markdown(NUMBERS, ("ssim", "sifid")).splitlines()
    assert head.startswith("| system | SSIM (RGB) ↑ | SIFID ↓ | s / picture | paper: LPIPS ↓ | SSIM ↑")
    assert rival == "| RIVAL | 0.400 ± 0.100 | 0.6000 ± 0.1000 | 3.00 | 0.4488 | 0.5851 | 0.0133 | 0.8772 |"
    assert ours == ("| Ours, λ = 0.7 | **0.700** ± 0.100 | **0.3000** ± 0.1000 | 4.50 | 0.5413 | 0.5740 | 0.0150 | "
                    "0.8822 |")
    assert "against RIVAL's 3.00 s: Ours, λ = 0.7 4.50 s (+50.0 %)" in overhead(NUMBERS)


def test_grids_show_different_references_first():
    items = [Item(i, Pair(ROOT / f"{i // 2}.png", "p"), SYSTEMS["isadca"], 0) for i in range(6)]
    assert [item.index for item in spread(items)] == [0, 2, 4, 1, 3, 5]


def test_the_csv_is_what_the_table_averages(pairs, tmp_path):
    results = tmp_path / "results"
    run(pairs, "-o", results, *FEW)
    column = [float(row["ssim"]) for row in rows(results) if row["system"] == "ip-adapter"]
    line = next(x for x in (results / "table.md").read_text().splitlines() if x.startswith("| IP-Adapter"))
    assert f"{mean(column):.3f}" in line.split("|")[2]
    assert "Figures of the demo world" in (results / "table.md").read_text()


def test_the_demos_pairs_name_nouns_of_the_demo_world():
    found = read_pairs(DEMO / "pairs")
    assert len(found) == 20 and len({pair.reference for pair in found}) == 10
    assert all(Image.open(pair.reference).size == (64, 64) for pair in found)
    assert len(SYSTEMS) == 5
