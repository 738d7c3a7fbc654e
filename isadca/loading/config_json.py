"""A folder's config.json as sizes of a network, scheduler_config.json as a schedule. Settings that would change the
mathematics are refused, not ignored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..common.problem import Problem
from ..ddim import Schedule, ScheduleConfig
from ..networks.sizes import CLIPTextConfig, CLIPVisionConfig, UNetConfig
from ..networks.tokenizer import read_text

AGAIN = "copy it again from the model's repository"
PLAIN_ONE = "use a plain Stable Diffusion 1.x model"
LONGEST, LARGEST = 2**24, 2**20  # bytes of a file, any size in it
MOST = {"layers": 64, "layers_per_block": 16, "channels": 8}  # what is built before it is compared with the weights


class Key(NamedTuple):
    """A key of a config file, as config_json.tsv has it: the field that it fills, the values under which our
    mathematics is the model's (none: any), and what the library that wrote the file means where it is absent."""

    field: str
    computed: list
    absent: object


def _read_keys() -> dict[str, dict[str, Key]]:
    table: dict[str, dict[str, Key]] = {}
    for line in Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()[1:]:
        config, key, field, computed, absent, _ = line.split("\t")
        table.setdefault(config, {})[key] = Key(field, json.loads(computed or "[]"), json.loads(absent or "null"))
    return table


KEYS = _read_keys()
PER_LEVEL = {"attention_head_dim", "only_cross_attention", "layers_per_block", "cross_attention_dim",
             "transformer_layers_per_block"}  # a list of equal values is that value


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises Problem for anything else, however long or deep."""
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"it is longer than {LONGEST >> 20} MB")
        raw = json.loads(read_text(path))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}, not an object")
        return raw
    except OSError as error:
        raise Problem(f"{path}: cannot be read ({error.strerror}); check the file") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise Problem(f"{path}: not a readable config ({str(error)[:100]}); {AGAIN}") from None


def read_config(cls, path: Path):
    """The dataclass `cls` from a diffusers or transformers config.json; its defaults where there is no such file.

    Raises Problem for unreadable JSON and for a setting that isadca does not compute. `steps_offset` is 1 whatever
    the file says, as StableDiffusionPipeline has it.
    """
    if not path.exists():
        return cls()
    raw = read_json(path)
    half = {CLIPTextConfig: "text_config", CLIPVisionConfig: "vision_config"}.get(cls)
    if isinstance(raw.get(half), dict):  # a whole CLIP, with both halves in one file
        raw = raw[half] | {"projection_dim": raw.get("projection_dim", 512)}
    values = {}
    for name, key in KEYS[cls.__name__].items():
        value = raw.get(name, key.absent)
        if name in PER_LEVEL and isinstance(value, list) and value and value == value[:1] * len(value):
            value = value[0]
        if name in raw and key.computed and value not in key.computed:
            raise Problem(f"{path}: {name} is {_short(value)}, isadca computes {' or '.join(map(repr, key.computed))} "
                          f"only; {PLAIN_ONE}")
        if key.field and (name in raw or key.absent is not None):
            values[key.field] = tuple(value) if isinstance(value, list) else value
    if cls is UNetConfig and raw.get("down_block_types") is not None:
        values["attention"] = _attending_levels(raw, path)
    config = _checked(cls, values, path)
    return replace(config, steps_offset=1) if cls is ScheduleConfig else config


def _attending_levels(raw: dict, path: Path) -> tuple[bool, ...]:
    """Which levels attend, from the block types' names; the way up must mirror the way down."""
    down, up = raw.get("down_block_types"), raw.get("up_block_types")
    attention = tuple("CrossAttn" in str(name) for name in down) if isinstance(down, list) else ()
    names = lambda way, levels: [f"CrossAttn{way}Block2D" if attends else f"{way}Block2D" for attends in levels]
    if not attention or down != names("Down", attention) or up != names("Up", attention[::-1]):
        raise Problem(f"{path}: block types {_short(down)} and {_short(up)} are not Stable Diffusion 1.x's; "
                      f"{PLAIN_ONE}")
    return attention


def _checked(cls, values: dict, path: Path):
    """Build `cls`, turning a wrong type or size into one line that names the file and the field."""
    default = cls()
    for field, value in values.items():
        usual = getattr(default, field)
        if not _fits(value, usual, 0 if field == "steps_offset" else 1, MOST.get(field, LARGEST)):
            raise Problem(f"{path}: {field} is {_short(value)}, expected a {type(usual).__name__} such as {usual!r}; "
                          f"{AGAIN}")
    config = cls(**values)
    widths = getattr(config, "channels", (getattr(config, "width", 0),))
    for field in ("n_heads", "norm_groups"):
        if any(width % getattr(config, field, 1) for width in widths):
            raise Problem(f"{path}: {field} is {getattr(config, field)}, which does not divide {_short(widths)}; "
                          f"{AGAIN}")
    if len(getattr(config, "attention", widths)) != len(widths):
        raise Problem(f"{path}: {len(widths)} channels for {len(config.attention)} block types; {AGAIN}")
    return config


def _fits(value, usual, least: int, most: int) -> bool:
    """Whether a value has the type of the usual one, and a size that can be built."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and 0 < len(value) <= most and all(
            _fits(v, usual[0], least, LARGEST) for v in value)
    if isinstance(usual, float):
        return type(value) in (int, float) and 0 < value < LARGEST
    return type(value) is type(usual) and (type(value) is not int or least <= value <= most)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def read_schedule(path: Path) -> Schedule:
    """The noise levels of a scheduler_config.json. Raises Problem where they do not fall from 1 towards 0."""
    schedule = Schedule(config := read_config(ScheduleConfig, path))
    levels = [schedule.alpha_bar(t) for t in range(config.train_steps)]
    if not (1 > levels[0] and levels == sorted(levels, reverse=True) and levels[-1] > 0):
        raise Problem(f"{path}: beta_start {config.beta_start} and beta_end {config.beta_end} make no falling noise "
                      f"levels; {AGAIN}")
    return schedule
