"""The command line as tests call it: arguments that work, and what a refusal must look like. Not a test file."""

import json
import os
import struct

from conftest import ROOT

from isadca.app.cli import main

CAT = str(ROOT / "examples" / "cat.png")


def refused(capsys, argv: list, *words: str) -> str:
    """What every case comes to. A remedy follows a semicolon, or is what was `expected`."""
    before = sorted(os.listdir())
    code = main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("isadca: ") and "Traceback" not in err
    assert [word for word in words if word not in err] == [], err
    assert "; " in err or "expected" in err, f"no remedy: {err}"
    assert sorted(os.listdir()) == before, "nothing is left behind"
    return err


def vary(*flags, ref=CAT, prompt="a lemon") -> list:
    return ["vary", ref, prompt, "-o", "a.png", "-q", "--steps", "2", *flags]


def raw(header, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape=(2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
