"""Shell completion, by the shell itself: what it offers for a line that is half typed."""

import shutil
import subprocess

import pytest

from isadca.app.cli import main
from isadca.app.flags import parser

OFFERED = {  # the line so far, its last word being completed
    "va": ["vary"],
    "": [*parser()[1]],
    "vary --in": ["--init"],
    "vary cat.png 'a lemon' --init ": ["inverted", "shuffle", "gaussian", "random"],
    "sweep cat.png --mix a": ["attention"],
    "vary --method riv": ["rival", "rival-edit", "rival-variation"],
    "completion ": ["--help", "bash", "zsh"],
    "inspect cat": []}
ASK = """
words=({line})
COMP_WORDS=(isadca "${{words[@]}}" {last}) COMP_CWORD=$(({count}))
_isadca isadca {last} "${{COMP_WORDS[COMP_CWORD-1]}}"
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def script(capsys):
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("line", OFFERED)
def test_bash_completes(script, line):
    before, _, last = line.rpartition(" ")
    ask = ASK.format(line=before, last=f"'{last}'", count="${#words[@]} + 1")
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.split() == OFFERED[line]


def test_zsh_reads_the_same(script, capsys):
    assert main(["completion", "zsh"]) == 0
    out = capsys.readouterr().out
    assert out == "autoload -Uz bashcompinit && bashcompinit\n" + script
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-fc", f"autoload -Uz compinit && compinit -D\n{out}"], check=True)
