"""The script for a GPU that is seldom at hand: every part runs, on a CPU and at a tiny size."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "examples" / "benchmark" / "gpu.py"


def run(tmp_path, *flags: str) -> str:
    out = tmp_path / "gpu.md"
    done = subprocess.run([sys.executable, str(SCRIPT), "--size", "tiny", "--device", "cpu", "--steps", "2",
                           "-o", str(out), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_part_has_its_row(tmp_path):
    table = run(tmp_path)
    for row in ("product of", "UNet, bf16, batch 1, eager", "UNet, fp16, batch 8, compiled", "whole job, N = 1, noise",
                "each further variation", "whole job, N = 4, attention", "whole job, RIVAL's rows",
                "λ and DCA over ISA alone, attention", "a guided step", "picture after 2 steps, fp16"):
        assert f"| {row}" in table, row
    assert "failed" not in table and "no time" not in table


def test_what_comes_too_late_says_so_and_the_rest_is_kept(tmp_path):
    table = run(tmp_path, "--what", "card,whole", "--minutes", "-1")
    assert "| card | no time was left |" in table and "| whole | no time was left |" in table
