"""Help, made from the fields of Method, without torch."""

import subprocess
import sys
from dataclasses import fields
from inspect import signature

from isadca.app.flags import parser
from isadca.loop import Options
from isadca.methods import Method
from isadca.reference import replay


def test_module_and_help_run_without_torch():
    code = ("import sys; from isadca.app.cli import main\ntry: main(['vary', '--help'])\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--lam" in done.stdout and "example: isadca vary" in done.stdout
    done = subprocess.run([sys.executable, "-m", "isadca", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("isadca 0.")


def test_a_knob_is_a_field_of_method():
    """Its flag, its words and its value in parentheses are the field's; a None is what was not typed."""
    vary, sweep = (parser()[1][name]._option_string_actions for name in ("vary", "sweep"))
    for field in fields(Method):
        if "help" in field.metadata:
            action = vary[f"--{field.name.replace('_', '-')}"]
            assert action.default is None and action.help.startswith(field.metadata["help"])
            shown = action.help[:-1].split(" (")[-1]
            assert shown == "all" if field.default is None else float_or_text(shown) == field.default
            assert field.name == "lam" or action.option_strings[0] in sweep


def test_what_the_flags_say_of_the_loop_is_the_loops():
    """They wait for no torch, and so have these two defaults of their own."""
    vary, options = parser()[1]["vary"], Options()
    assert vary.get_default("rows_at_once") == options.rows_at_once
    assert vary.get_default("replay_at_once") == options.at_once == signature(replay).parameters["at_once"].default


def float_or_text(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def test_help_is_in_groups_the_basic_one_first():
    groups = [group.title for group in parser()[1]["vary"]._action_groups if group._group_actions]
    assert groups == ["options", "basic", "method", "files", "machine"]
