"""The scripts that pages tell a reader to run start where the reader stands: outside the tests' own search path."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [page.read_text(encoding="utf-8") for page in ROOT.glob("**/*.md")]
NAMED = {name for page in PAGES for name in re.findall(r"\bpython ((?:examples|tests)/[\w/]+\.py)", page)}
WITH_HELP = sorted(name for name in NAMED if "argparse" in (ROOT / name).read_text(encoding="utf-8"))


def test_there_are_scripts():
    assert "examples/benchmark/benchmark.py" in WITH_HELP and len(WITH_HELP) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("script", WITH_HELP)
def test_help(script, tmp_path):
    """All that a script imports at its head is found, without pytest's folders on the path."""
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-500:]
