"""The user's own code: found as `python FILE.py` would find it, checked while it runs, and its failures its own."""

import hashlib
import sys

import pytest
from commandline import refused, vary

from isadca import Method
from isadca.app.cli import main
from isadca.app.recipe import read_recipe
from isadca.app.own_code import load_own, own_failure
from isadca.common.problem import Problem

PLAIN = "def mine(controls):\n    return controls.kernel\n"


def test_the_object_and_the_sha256_of_the_bytes_that_ran(folder):
    (folder / "mine.py").write_text("value = 7\n")
    assert load_own(f"{folder}/mine.py:value", "--method") == (7, hashlib.sha256(b"value = 7\n").hexdigest())


def test_its_folder_is_importable_and_nothing_of_it_stays(folder):
    """Two folders may each have a helpers.py."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "helpers.py").write_text(f"who = {name!r}\n")
        (folder / name / "mine.py").write_text("from helpers import who\n")
    before = list(sys.path)
    assert [load_own(f"{folder}/{name}/mine.py:who", "--method")[0] for name in "ab"] == ["a", "b"]
    assert sys.path == before and "helpers" not in sys.modules


def test_the_sha256_covers_the_neighbours_that_it_imports(folder):
    """By content: modules and packages of its folder, however deep; nothing else that lies there or was loaded."""
    (folder / "lib").mkdir()
    files = {"mine.py": "import helpers, lib.deep, json\nvalue = 7\n", "helpers.py": "import third\n",
             "third.py": "", "lib/deep.py": "depth = 2\n", "unused.py": ""}
    for name, text in files.items():
        (folder / name).write_text(text)
    digests = {"": load_own(f"{folder}/mine.py:value", "--method")[1]}
    assert load_own(f"{folder}/mine.py:value", "--method")[1] == digests[""] and "lib" not in sys.modules
    for name, text in files.items():
        (folder / name).write_text(text + "# changed\n")
        digests[name] = load_own(f"{folder}/mine.py:value", "--method")[1]
        (folder / name).write_text(text)
    assert digests.pop("unused.py") == digests[""]
    assert len(set(digests.values())) == 5


def test_what_the_folder_holds_of_others_stays_loaded(folder, monkeypatch):
    """A file in the root of a clone has isadca itself, and perhaps a virtual environment, in its folder."""
    (folder / "clone").mkdir()
    (folder / "clone" / "__init__.py").write_text("")
    (folder / "clone" / "part.py").write_text("")
    (folder / "venv" / "site").mkdir(parents=True)
    (folder / "venv" / "site" / "installed.py").write_text("")
    (folder / "mine.py").write_text("import clone.part, installed\nvalue = 7\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(folder / "venv" / "site")
    __import__("clone")
    digest = hashlib.sha256((folder / "mine.py").read_bytes()).hexdigest()
    assert load_own(f"{folder}/mine.py:value", "--method") == (7, digest)
    assert {"clone.part", "installed"} <= sys.modules.keys()
    for name in ("clone", "clone.part", "installed"):
        monkeypatch.delitem(sys.modules, name)


def test_a_dataclass_in_it_works(folder):
    (folder / "mine.py").write_text("from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
                                    "class D:\n    x: int = 3\nmade = D()\n")
    assert load_own(f"{folder}/mine.py:made", "--method")[0].x == 3


FILES = {  # the file, and what the line says
    "broken": ("def f(:\n", "mine.py, line 1: SyntaxError: "),
    "raises": ("x = 1\n1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero"),
    "leaves": ("raise SystemExit(3)\n", "mine.py, line 1: SystemExit: 3"),
    "imports": ("import nowhere_to_be_found\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere_"),
    "another": ("def other(controls): pass\n", "mine.py: has no 'mine', expected one of its own names: other"),
    "empty": ("", "mine.py: has no 'mine', expected one of its own names: it has none"),
    "latin-1": ("# caf\udce9\n", "mine.py"),
    "a number": ("mine = 7\n", "mine.py:mine: is a int, expected a Method or a function Controls -> Attend"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_used(folder, capsys, case):
    text, says = FILES[case]
    (folder / "mine.py").write_text(text, errors="surrogateescape")
    refused(capsys, vary("--method", f"{folder}/mine.py:mine"), says)


RESULTS = {  # what a function returns, and what the line says
    "None": ("return None", "returned NoneType, expected a function (q, k, v, site) -> y"),
    "a list": ("return lambda q, k, v, site: [1]", "gave a list at "),
    "one row": ("return lambda q, k, v, site: controls.kernel(q, k, v, site)[:1]", "gave (1, "),
    "one query": ("return lambda q, k, v, site: controls.kernel(q, k, v, site)[:, :, :1]", ", the shape of q"),
    "NaN": ("return lambda q, k, v, site: controls.kernel(q, k, v, site) * float('nan')", "gave inf or NaN at "),
}


@pytest.mark.parametrize("case", RESULTS)
def test_what_it_returns_is_looked_at(folder, capsys, case):
    """Torch stretches one row over all of them; the default method's guidance would be blamed for a NaN."""
    does, says = RESULTS[case]
    (folder / "mine.py").write_text(f"def mine(controls):\n    {does}\n")
    refused(capsys, vary("--method", f"{folder}/mine.py:mine"), "mine.py:mine: ", says)


def test_its_failures_show_its_own_frames_and_one_line(folder, capsys):
    (folder / "helpers.py").write_text("def deeper(q):\n    return q @ q\n")
    (folder / "mine.py").write_text("from helpers import deeper\ndef mine(controls):\n    def attend(q, k, v, site):\n"
                                    "        return deeper(q[..., 1:, :])\n    return attend\n")
    assert main(vary("--method", f"{folder}/mine.py:mine")) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "isadca/loop.py" not in err and err.count('  File "') == 2
    assert "return deeper(q[..., 1:, :])" in err and "helpers.py" in err
    assert err.splitlines()[-1].startswith(f"isadca: {folder}/helpers.py, line 2, in deeper: RuntimeError: ")
    assert err.endswith("; this is your own code\n")


def test_other_failures_are_not_taken_for_the_users():
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0
    assert own_failure(caught.value) is None


def test_a_function_and_a_method(folder, capsys):
    (folder / "mine.py").write_text(f"from isadca import Method\n{PLAIN}idea = Method('idea', mix=mine, k=1)\n"
                                    "half = Method('half', lam=0.5)\n")
    for out, name in {"a": "mine", "c": "idea"}.items():
        assert main(vary("--method", f"{folder}/mine.py:{name}", "-o", f"{out}.png")) == 0
    from isadca.common.images import load_image
    assert main(vary("--method", f"{folder}/mine.py:half", "-o", "d.png")) == 0
    assert main(vary("--lam", "0.5", "-o", "e.png")) == 0
    assert load_image("d.png").tobytes() == load_image("e.png").tobytes()
    digest = hashlib.sha256((folder / "mine.py").read_bytes()).hexdigest()
    assert read_recipe("a.png")["weights_sha256"]["--method"] == digest


def test_flags_that_have_no_effect_are_named(folder, capsys):
    (folder / "mine.py").write_text(PLAIN)
    assert main(vary("--method", f"{folder}/mine.py:mine", "--mix", "attention", "--layers", "0")) == 0
    assert "--mix, --layers: no effect" in capsys.readouterr().err


def test_a_recipe_does_not_run_code_and_notices_other_code(folder, capsys):
    (folder / "mine.py").write_text(PLAIN)
    where = f"{folder}/mine.py:mine"
    assert main(vary("--method", where, "-o", "x.png")) == 0
    capsys.readouterr()
    again = ["vary", "--recipe", "x.png", "-q", "-o"]
    refused(capsys, [*again, "y.png"], f"made with --method {where}; give the flag")
    assert main([*again, "y.png", "--method", where]) == 0
    (folder / "mine.py").write_text(PLAIN + "# changed\n")
    capsys.readouterr()
    refused(capsys, [*again, "z.png", "--method", where], "made with another --method")


def test_a_recipe_notices_a_changed_neighbour(folder, capsys):
    (folder / "mine.py").write_text(f"import helpers\n{PLAIN}")
    (folder / "helpers.py").write_text("")
    where = f"{folder}/mine.py:mine"
    assert main(vary("--method", where, "-o", "x.png")) == 0
    (folder / "helpers.py").write_text("# changed\n")
    capsys.readouterr()
    refused(capsys, ["vary", "--recipe", "x.png", "-o", "z.png", "-q", "--method", where], "made with another --method")


def test_problems_say_where(folder):
    with pytest.raises(Problem, match="^--systems is 'a.py:b', expected FILE.py:NAME"):
        load_own("a.py:b", "--systems")
    assert Method().mix == "noise"
