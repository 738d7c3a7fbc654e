"""isadca: image variations by intra-image self-attention, decoupled cross-attention and λ, from scratch.

    model = isadca.load()                                   # the demo checkpoint; or a Stable Diffusion 1.5 path
    ref = isadca.invert(model, isadca.load_image("cat.png"))
    [picture] = isadca.vary(model, ref, "a lemon", isadca.Method(lam=0.7))
"""

import re
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# which module each public name is in: read from __init__.pyi, which says it to type checkers, too
_IMPORTS = re.findall(r"^from \.([\w.]+) import (\([^)]*\)|.*)", Path(__file__).with_suffix(".pyi").read_text(), re.M)
_MODULE = {name: module for module, names in _IMPORTS for name in re.findall(r"(\w+) as", names)}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    """Import on first use, so that `isadca --help` does not wait for torch."""
    if name in _MODULE:
        return getattr(import_module(f".{_MODULE[name]}", __name__), name)
    raise AttributeError(f"module 'isadca' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
