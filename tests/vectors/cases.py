"""The file format of the vectors: a safetensors file of arrays, and a list of cases in its metadata.

A case says: this function, called with these arguments, gives this result to within this tolerance; and a result like
one of those others comes of this known mistake. NumPy and safetensors are all that is needed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
FORMAT = "conformance vectors 1"
ERROR = "error"  # stands for a result where the function has to refuse its arguments

Value = np.ndarray | dict | str  # one array, several by name, or ERROR


@dataclass
class Case:
    function: str
    name: str
    arguments: dict          # arrays, numbers, texts, settings; File for what another file holds
    expected: Value
    tolerance: float         # largest absolute difference of any element, for arithmetic in float64
    mistakes: dict[str, Value] = field(default_factory=dict)  # what it looks like -> what it would give


@dataclass(frozen=True)
class File:
    """An argument that is a whole file: a dict of float64 arrays, what a JSON file says, or the lines of a text."""

    path: str

    def load(self):
        path = HERE / self.path
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8").splitlines()
        return {name: np.asarray(array, np.float64) for name, array in load_file(path).items()}


def write(path: Path, cases: list[Case]) -> None:
    """Write the cases of one file. An array that several of them use is stored once."""
    arrays, names = {}, {}

    def put(value, name: str):
        if isinstance(value, File):
            return {"file": value.path}
        if isinstance(value, dict):
            return {key: put(inner, f"{name}.{key}") for key, inner in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        content = (value.dtype.str, value.shape, value.tobytes())
        if content not in names:
            names[content] = name
            arrays[name] = np.ascontiguousarray(value)
        return {"array": names[content]}

    listed = []
    for case in cases:
        prefix = f"{case.function}.{case.name}"
        listed.append({"function": case.function, "name": case.name, "tolerance": case.tolerance,
                       "arguments": {key: put(value, f"{prefix}.{key}") for key, value in case.arguments.items()},
                       "expected": put(case.expected, f"{prefix}.expected"),
                       "mistakes": {what: put(value, f"{prefix}.mistake {i}")
                                    for i, (what, value) in enumerate(case.mistakes.items())}})
    save_file(arrays, path, {"format": FORMAT, "cases": json.dumps(listed)})


def read(path: Path) -> list[Case]:
    """The cases of one file."""
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} is not a file of {FORMAT}")
        arrays = {name: file.get_tensor(name) for name in file.keys()}

    def get(value):
        if not isinstance(value, dict):
            return value
        if value.keys() == {"array"}:
            return arrays[value["array"]]
        if value.keys() == {"file"}:
            return File(value["file"])
        return {key: get(inner) for key, inner in value.items()}

    return [Case(**{key: get(value) for key, value in case.items()}) for case in json.loads(about["cases"])]


def read_all() -> list[Case]:
    """The cases of every file of vectors in this folder."""
    return [case for path in sorted(HERE.glob("*.safetensors")) for case in read(path)]


def distance(a: Value, b: Value) -> float:
    """The largest absolute difference of two results; infinite where they are not of one kind, shape or not finite."""
    if isinstance(a, dict) and isinstance(b, dict):
        return max((distance(a[key], b[key]) for key in a), default=0.0) if a.keys() == b.keys() else np.inf
    if isinstance(a, str) or isinstance(b, str):
        return 0.0 if isinstance(a, str) and isinstance(b, str) and a == b else np.inf
    if isinstance(a, dict) or isinstance(b, dict):
        return np.inf
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        return np.inf
    difference = np.abs(a - b).max(initial=0.0)
    return float(difference) if np.isfinite(difference) else np.inf
