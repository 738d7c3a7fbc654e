"""Flags that make no sense, are mistyped or come from elsewhere: each is refused in one short line."""

from pathlib import Path

import pytest
from commandline import CAT, refused, vary

from isadca.app import commands
from isadca.app.cli import main
from isadca.app.flags import parser
from isadca.common.problem import LONGEST, Problem

DIGITS = "9" * 5000
LONG = "x" * 100_000

FLAGS = {  # after `vary REF PROMPT -o a.png`: what the line says
    ("--layers", "5-3"): "'5-3', expected such as 10-15 or 0,1,6", ("--layers", "1-2-3"): "'1-2-3', expected such",
    ("--layers", "0-99999999999"): "expected such as 10-15", ("--layers", "1,,2"): "expected such as 10-15",
    ("--layers", ""): "expected such as 10-15", ("--layers", "\u0661"): "expected such as 10-15",
    ("--layers", f"{DIGITS}"): "expected such as 10-15", ("--ip-layers", "5-3"): "'5-3', expected such as 10-15",
    ("--n", "2000000000"): "--n: '2000000000', expected 1 to 10000",
    ("--rows-at-once", "99999999999999999999"): "--rows-at-once: '99999999999999999999', expected 1 to",
    ("--replay-at-once", "99999999999999999999"): "--replay-at-once: '99999999999999999999', expected 1 to",
    ("--n", DIGITS): "--n: '999", ("--seed", DIGITS): "expected 0 to 4611686018427387904",
    ("--seed", str(2**63)): f"--seed: '{2**63}', expected 0 to {2**62}", ("--n", "²"): "--n: '²', expected 1 to 10000",
    ("--guidance", "1e999"): "guidance is inf, expected a finite number", ("--k", DIGITS): "--k: invalid int value",
    ("--lam", LONG): "lam is 'xxx", ("--lam", "linear:0:nan"): "expected 0 to 1", ("--lam", ""): "lam is ''",
    ("--lam", "cosine:1:0:1"): "expected a number such as 0.7",
    ("--method", LONG): "method is 'xxx", ("--method", ""): "method is '', expected one of",
    ("--method", ".py:x"): "expected FILE.py:NAME",
    ("--method", "a\0.py:x"): "--method is", ("--method", "no.py:x"): "--method is 'no.py:x', expected FILE.py:NAME",
    ("--weights", ""): "--weights is '', expected a path", ("--vae", ""): "--vae is '', expected a path",
    ("--ip-adapter", ""): "--ip-adapter is ''", ("--image-encoder", ""): "--image-encoder is ''",
    ("--weights", "a\0b"): "--weights is 'a\\x00b', expected a path",
    ("--vae", "a\0b"): "--vae is", ("--weights", LONG): "xxx", ("--fit", LONG): "--fit: invalid choice",
    ("--dtype", LONG): "dtype is 'xxx", ("--device", "hpu"): "device 'hpu' is not available here; try --device cpu",
    ("--device", "privateuseone"): "device 'privateuseone' is not available here",
    ("--device", "cuda:99"): "device 'cuda:99' is not available here",
    ("--device", LONG): "device 'xxx", (f"--{LONG}",): "unrecognized arguments",
    ("--log", "no/such/x.json"): "no/such/x.json: the folder no/such does not exist",
}


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: " ".join(f)[:40])
def test_flags_that_make_no_sense(folder, capsys, flags):
    err = refused(capsys, vary(*flags), FLAGS[flags])
    assert len(err) <= 300


ELSEWHERE = {  # what other tools call it
    "--cfg": "--guidance", "--cfg-scale": "--guidance", "--guidance-scale": "--guidance",
    "--num-inference-steps": "--steps", "--num_inference_steps": "--steps", "-s": "--steps",
    "--negative-prompt": "--negative", "--num-images": "--n", "--num-images-per-prompt": "--n", "--batch-size": "--n",
    "--lambda": "--lam", "--model": "--weights", "--strength": "--diversity", "--attend": "--method", "-W": "--width",
    "--ip-adapter-scale": "--ip-scale", "--force": "--overwrite", "--output-dir": "--out", "--fp16": "--dtype"}


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_flags_from_elsewhere(folder, capsys, flag):
    refused(capsys, vary(flag, "7"), f"unrecognized arguments: {flag}", f"did you mean {ELSEWHERE[flag]}?",
            "see isadca vary --help")


@pytest.mark.parametrize("flag", ["--prompt", "--image", "--lora", "--denoise", "--scheduler"])
def test_flags_that_are_near_in_spelling_only(folder, capsys, flag):
    assert "did you mean" not in refused(capsys, vary(flag, "7"), f"unrecognized arguments: {flag}")


def test_a_flag_from_elsewhere_is_named_before_what_is_missing(folder, capsys):
    refused(capsys, ["vary", "--cfg", "7"], "unrecognized arguments: --cfg", "did you mean --guidance?")
    refused(capsys, ["vary", CAT, "a lemon"], "vary needs", "-o OUT")


SHORTENED = ["--gri", "--guid", "--neg", "--repl", "--stats", "--weight", "--ip-adapt", "--lama", "--metod", "--seeds"]


@pytest.mark.parametrize("flag", SHORTENED)
def test_shortened_and_mistyped_flags(folder, capsys, flag):
    """An abbreviation would let a recipe set what it may not."""
    refused(capsys, vary(f"{flag}=7"), f"unrecognized arguments: {flag}=7", "see isadca vary --help")


@pytest.mark.parametrize("command", parser()[1])
def test_each_commands_own_help_is_pointed_to(folder, capsys, command):
    refused(capsys, [command, "--nonsense"], f"; see isadca {command} --help")


@pytest.mark.parametrize("argv", [
    ["vary", "R", "-o", "a.png", "P"], ["vary", "-o", "a.png", "R", "P"], ["vary", "R", "P", "-o", "a.png"],
    ["vary", "-q", "R", "-n", "1", "P", "-o", "a.png"], ["vary", "R", "-o", "a.png", "--", "P"]], ids=" ".join)
def test_flags_may_stand_anywhere(folder, monkeypatch, argv):
    given = []
    monkeypatch.setattr(commands, "vary", given.append)
    assert main(argv) == 0
    assert (given[0].refs, given[0].prompt, given[0].out) == (["R"], "P", Path("a.png"))


def test_messages_are_short_and_keep_both_ends():
    text = str(Problem(f"a.png: {LONG}\n{'y' * 10**6}; do this"))
    assert len(text) <= LONGEST and text.startswith("a.png: xxx") and text.endswith("y; do this") and " ... " in text
