"""Systems as values: names with fields changed, Methods, functions and the user's own files, and when each is made
again."""

import csv
import shutil
from dataclasses import replace

import pytest
from conftest import DEMO, ROOT

import isadca
from isadca.app import cli
from isadca.app.evaluate import parse_systems
from isadca.common.problem import Problem
from isadca.evaluation import results_folder
from isadca.evaluation.run import CODE
from isadca.evaluation.systems import SYSTEMS, System, system_fingerprint, system_of
from isadca.methods import ISADCA, Linear, Method

IDEA = """from isadca import attend

def idea(controls):
    def mine(q, k, v, site):
        return attend(q, k, v, site) * SCALE
    return mine

SCALE = 1.0
faint = "no method"
"""


WHOLE = """from dataclasses import replace
from isadca import PRESETS, System

def prepare(folder, model, weights, steps):
    return lambda reference, prompt, seed: reference.resize((model.size + GROWN,) * 2)

GROWN = 0
COPY = System("copy", "The reference itself", prepare, paper=(0.0, 1.0, 0.0, 1.0))
PLAIN = System("text", "Text alone", PRESETS["plain"])
"""


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """One pair; the current folder holds mine.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    shutil.copy(DEMO / "references" / "cat.png", tmp_path / "pairs")
    (tmp_path / "pairs" / "pairs.csv").write_text("reference,prompt\ncat.png,a lemon\n")
    (tmp_path / "mine.py").write_text(IDEA)
    return tmp_path / "pairs"


def run(systems: str) -> int:
    return cli.main(["evaluate", "-q", "pairs", "-o", "results", "--systems", systems, "--metrics", "ssim",
                     "--steps", "2"])


def made(results) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in results.rglob("*-0.png")}


# ---- what a value means --------------------------------------------------------------------------------------------

def test_fields_after_a_colon():
    first, second, third, own = parse_systems("isadca:lam=0.3,rival:guidance=5:init=inverted,isadca-attention:t-start="
                                              "900:layers=2-4:ip-layers=1:lam=linear:1:0,examples/my_attention.py:my_attention")
    assert first.method == Method(lam=0.3) and first.name == "isadca:lam=0.3"
    assert (second.method.guidance, second.method.init, second.method.lam) == (5.0, "inverted", 1.0)
    assert third.method == Method(mix="attention", t_start=900, layers=(2, 3, 4), ip_layers=(1,),
                                  lam=Linear(1, 0))
    assert callable(own.method.mix) and len(own.code) == 64
    assert own.label == "my_attention.py:my_attention"  # a sheet's columns are narrow


@pytest.mark.parametrize("text, message", [
    ("isadca:", "isadca:', expected NAME:FIELD=VALUE"), ("isadca:lamb=1", "FIELD=VALUE, the fields being lam, mix"),
    ("isadca:lam", "lam is ''"), ("isadca:lam=2", "lam is 2, expected 0 to 1"), ("isadca:k=x", "expected such as k=0"),
    ("isadca:layers=a-b", "expected such as layers="), ("dalle:lam=1", "system is 'dalle'"), ("", "system is ''"),
    (f"{ROOT}/examples/counterparts/image_variations.py:SYSTEM:lam=1", "is not a method of the loop"),
    ("isadca:name=x", "the fields being"),
    ("none.py:idea", "--systems is 'none.py:idea', expected FILE.py:NAME"), ("isadca:lam=0.3:1", "lam is '0.3:1'")])
def test_bad_texts_are_named(text, message):
    with pytest.raises(Problem, match="(?s)" + message.replace("(", r"\(")):
        parse_systems(text)


def test_names_in_files_are_short_and_distinct():
    names = ["isadca", "a/b.py:f", "isadca:lam=0.3:k=1", "λ" * 200, "λ" * 201]
    files = [results_folder.file_name(name) for name in names]
    assert files[:3] == ["isadca", "a_b.py_f", "isadca_lam=0.3_k=1"]
    assert len(set(files)) == 5 and max(map(len, files)) <= 100


def test_values_from_python():
    def mine(controls):
        return controls.kernel
    assert system_of("isadca") is SYSTEMS["isadca"] is system_of(ISADCA)
    assert system_of("masactrl").method.guidance == 7
    assert system_of(Method(lam=0.3, k=20)).name == "isadca:lam=0.3:k=20"
    assert system_of(Method("mine", lam=0.3)).name == "mine"
    copy = System("copy", "Copy", mine)
    assert system_of(copy) is copy
    assert system_of(mine).name == "mine" and system_of(mine).method.mix is mine
    for value in (3, None, "dalle"):
        with pytest.raises(Problem, match="system is"):
            system_of(value)


def test_a_fingerprint_tells_what_a_system_does():
    """By values, and for functions by their source and what they close over; the same twice."""
    def scaled(by):
        def mine(controls):
            return by and controls.kernel
        return mine
    values = [ISADCA, Method(lam=0.3), Method(lam=Linear(1, 0)), Method(lam=Linear(1, 0.5)), scaled(1), scaled(2),
              scaled([1]), scaled([1]), lambda controls: controls.kernel]
    found = [system_fingerprint(system_of(value)) for value in values]
    assert len(set(found)) == len(values)  # a list is not looked into: taken for another
    assert found == [system_fingerprint(system_of(value)) for value in values]
    assert system_fingerprint(system_of(scaled(1))) == found[4]


def test_the_packages_code_counts_but_not_its_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(results_folder, "PACKAGE", tmp_path)
    digests = []
    for text in ("x = 1\n", "x = 1  # one\n\n", "x = 2\n"):
        (tmp_path / "loop.py").write_text(text)
        digests.append(results_folder.code_sha256(["*.py"]))
    assert digests[0] == digests[1] != digests[2]


def test_what_computes_a_picture_is_in_its_codes_sha256():
    """All of the rooms that a variation goes through; a new room, or a file moved to one, is not forgotten."""
    covered = {path for pattern in CODE for path in results_folder.PACKAGE.glob(pattern)}
    through = [path for room in ("", "common", "networks", "speed", "evaluation")
               for path in (results_folder.PACKAGE / room).glob("*.py")]
    assert {path.name for path in set(through) - covered} == {"report.py", "results_folder.py"}


def test_a_file_that_holds_a_system(pairs, tmp_path):
    """It keeps its own name and label; where it is a method of the loop, fields may be changed."""
    (tmp_path / "mine.py").write_text(WHOLE)
    copy, text, changed = parse_systems("mine.py:COPY,mine.py:PLAIN,mine.py:PLAIN:guidance=2")
    assert (copy.name, copy.label, len(copy.code)) == ("copy", "The reference itself", 64)
    assert (text.name, text.method) == ("text", isadca.PRESETS["plain"])
    assert changed.name == "mine.py:PLAIN:guidance=2" and changed.method.guidance == 2
    with pytest.raises(Problem, match="mine.py:COPY is not a method of the loop"):
        parse_systems("mine.py:COPY:lam=1")


# ---- whole runs ----------------------------------------------------------------------------------------------------

def test_a_changed_idea_is_made_again_and_an_unchanged_one_is_not(pairs, tmp_path, capsys):
    systems = "isadca:lam=0.5,isadca-0.5,mine.py:idea"
    assert run(systems) == 0
    before = made(tmp_path / "results")
    assert before["isadca_lam=0.5-0.png"][1] == before["isadca-0.5-0.png"][1] != before["mine.py_idea-0.png"][1]
    rows = list(csv.DictReader((tmp_path / "results" / "results.csv").open()))
    assert [row["system"] for row in rows] == systems.split(",")
    (tmp_path / "mine.py").write_text(IDEA.replace("SCALE = 1.0", "SCALE = 0.5"))
    assert run(systems) == 0
    after = made(tmp_path / "results")
    assert {name for name in before if before[name][0] != after[name][0]} == {"mine.py_idea-0.png"}
    assert before["mine.py_idea-0.png"][1] != after["mine.py_idea-0.png"][1]
    assert "1 of 3 variations were made by other code" in capsys.readouterr().err
    assert run("mine.py:faint") == 2 and "expected a Method or a function" in capsys.readouterr().err


def test_a_changed_neighbour_is_a_changed_idea(pairs, tmp_path, capsys):
    """What the idea's file imports from its folder is its code, too; what lies beside it and is not imported is not."""
    (tmp_path / "mine.py").write_text("from helpers import SCALE\n" + IDEA.replace("SCALE = 1.0", ""))
    (tmp_path / "helpers.py").write_text("SCALE = 1.0\n")
    times = []
    for name, text in [("helpers.py", "SCALE = 1.0\n"), ("other.py", "SCALE = 2\n"), ("helpers.py", "SCALE = 0.5\n")]:
        (tmp_path / name).write_text(text)
        assert run("mine.py:idea") == 0
        times.append(made(tmp_path / "results")["mine.py_idea-0.png"])
    assert times[0] == times[1] and times[1][0] != times[2][0] and times[1][1] != times[2][1]
    assert "1 of 1 variations were made by other code" in capsys.readouterr().err


def test_a_changed_system_is_made_again(pairs, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(WHOLE)
    assert run("rival,mine.py:COPY") == 0
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| The reference itself | **1.000** |" in table and "| 0.0000 | 1.0000 | 0.0000 | 1.0000 |" in table
    before = made(tmp_path / "results")
    (tmp_path / "mine.py").write_text(WHOLE + "# edited\n")
    assert run("rival,mine.py:COPY") == 0
    after = made(tmp_path / "results")
    assert {name for name in before if before[name][0] != after[name][0]} == {"copy-0.png"}


@pytest.mark.parametrize("change, message", [
    (("GROWN = 0", "GROWN = 1"), "copy: drew 65×65, expected a picture of 64×64"),
    (("reference.resize((model.size + GROWN,) * 2)", "None"), "copy: drew NoneType, expected a picture of 64×64"),
    (("return lambda", "lambda"), "copy: its function returned NoneType, expected a function (reference,")])
def test_what_a_system_draws_is_looked_at(pairs, tmp_path, capsys, change, message):
    (tmp_path / "mine.py").write_text(WHOLE.replace(*change))
    assert run("mine.py:COPY") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("results/pictures/*/copy*"))


def test_other_code_of_the_package_makes_again(pairs, tmp_path, monkeypatch):
    """A fork that edits attention.py gets its own numbers, not those of before."""
    assert run("rival") == 0
    before = made(tmp_path / "results")
    monkeypatch.setattr("isadca.evaluation.run.code_sha256", lambda patterns: "edited")
    assert run("rival") == 0
    after = made(tmp_path / "results")
    assert before["rival-0.png"][0] != after["rival-0.png"][0]


def test_a_system_has_its_own_steps_unless_all_are_given_some(pairs, demo, tmp_path):
    """Asked by the number of latents that each run starts from."""
    systems, asked = [Method("three", steps=3), Method("four", steps=4)], []

    def counts(controls):
        asked.append(controls.steps)
        return controls.kernel
    systems = [replace(method, mix=counts) for method in systems]
    for steps, expected, says in (None, {3, 4}, "each system at its own steps"), (2, {2}, "2 steps"):
        asked.clear()
        results = isadca.evaluate(pairs, systems, ["ssim"], tmp_path / f"of {steps}", demo, steps=steps)
        assert set(asked) == expected and says in results.files[1].read_text()


def test_from_python_in_one_call(pairs, demo, tmp_path):
    seen = []
    results = isadca.evaluate([(pairs / "cat.png", "a lemon")], ["rival", Method(lam=0.3)], ["ssim"], tmp_path / "r",
                              demo, steps=1, progress=lambda items, label: seen.append(label) or items)
    assert [path.name for path in results.files] == ["results.csv", "table.md", "fig3.png"]
    assert [(item.system.name, item.seed) for item in results.numbers] == [("rival", 0), ("isadca:lam=0.3", 0)]
    assert all(0 < numbers["ssim"] < 1 for numbers in results.numbers.values())
    assert seen[0] == "variations (0 of 2 there)"
    with pytest.raises(Problem, match="two systems have the same name"):
        isadca.evaluate(pairs, [Method("a b"), Method("a_b", lam=1)], ["ssim"], tmp_path / "r", demo, steps=1)
