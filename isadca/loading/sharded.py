"""A network in several files, listed by an index.json: as save_pretrained(max_shard_size=...) writes it."""

from collections.abc import Callable
from pathlib import Path

from ..common.problem import Problem
from .config_json import read_json
from .layouts import Header


def read_index(path: Path, read: Callable[[Path], Header]) -> Header:
    """The headers of all files that an index.json lists, as one. Raises Problem where one does not hold its share."""
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(name == Path(str(name)).name for name in listed.values()):
        raise Problem(f"{path}: has no weight_map from tensors to files beside it; download it again")
    files = {name: read(path.parent / name) for name in sorted(set(listed.values()))}
    for key, name in listed.items():
        if key not in files[name].tensors:
            raise Problem(f"{path}: {key} is not in {name}, where it should be; download both again")
    metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
    return Header(path, {key: files[name].tensors[key] for key, name in listed.items()}, metadata)
