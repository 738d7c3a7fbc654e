"""The examples in the docstrings of what is public run as they stand, one after the other, from a folder with a
picture."""

import inspect
import pydoc
import re
import shutil
import textwrap
from dataclasses import fields

import pytest
from conftest import ROOT

import isadca


def examples(value) -> list[str]:
    """The indented blocks of a docstring that stand after a blank line."""
    margin = "" if inspect.ismodule(value) else "    "
    found = re.findall(rf"\n\n((?:{margin}    .*\n)+)", f"{value.__doc__}\n")
    return [textwrap.dedent(block) for block in found]


DOCUMENTED = {"isadca": isadca} | {name: getattr(isadca, name) for name in isadca.__all__}
FOUND = {name: blocks for name, value in DOCUMENTED.items() if (blocks := examples(value))}


def test_there_are_examples():
    assert {"isadca", "record"} <= FOUND.keys()


@pytest.mark.slow
def test_they_run(tmp_path, monkeypatch):
    shutil.copy(ROOT / "examples" / "cat.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {"isadca": isadca}
    for name in sorted(FOUND, key=lambda name: name != "isadca"):  # what loads the model comes first
        for block in FOUND[name]:
            exec(compile(block, f"the docstring of {name}", "exec"), names)
    assert names["picture"].size == names["pictures"][0].size == (64, 64)
    maps = names["recorder"].maps
    assert maps and all(kept.t > 500 and kept.site.place == "up" for kept in maps)


def test_help_explains_each_field_of_a_method():
    text = pydoc.plain(pydoc.render_doc(isadca.Method))
    for field in fields(isadca.Method):
        assert f"{field.name}: {field.metadata['about']}" in text
