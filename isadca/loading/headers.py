"""What a safetensors file says of itself before a tensor is read: names, shapes, dtypes; and a network's part of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from ..common.problem import Problem
from .config_json import read_json

FLOATS = ("F16", "BF16", "F32", "F64")


class Stored(NamedTuple):
    """A tensor in a file: its name there, and what the header says of it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """One network's tensors, by our names. `path` is their file; of several, the index.json that lists them."""

    kind: str
    path: Path
    layout: str
    tensors: dict[str, Stored]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    @cached_property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> (shape, dtype) of a safetensors file, without reading the data. Raises Problem if it is not one."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        from .unreadable import unreadable
        raise unreadable(path, error) from None


def read_headers(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, or of the files that an index.json lists."""
    if path.suffix != ".json":
        return {key: Stored(key, path, *about) for key, about in read_header(path).items()}
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(name == Path(str(name)).name for name in listed.values()):
        raise Problem(f"{path}: has no weight_map from tensors to files beside it; download it again")
    headers = {name: read_header(path.parent / name) for name in set(listed.values())}
    lost = [key for key, name in listed.items() if key not in headers[name]]
    if lost:
        raise Problem(f"{path}: {lost[0]} is not in {listed[lost[0]]}, where it should be; download both again")
    return {key: Stored(key, path.parent / name, *headers[name][key]) for key, name in listed.items()}


def same_shape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    return theirs == ours or theirs == ours + (1, 1)  # LDM keeps the VAE's linear layers as 1×1 convolutions
