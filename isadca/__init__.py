"""isadca: image variations by intra-image self-attention, decoupled cross-attention and λ, from scratch.

    model = isadca.load()                                   # the demo checkpoint; or a Stable Diffusion 1.5 path
    ref = isadca.invert(model, isadca.load_image("cat.png"))
    [picture] = isadca.vary(model, ref, "a lemon", isadca.Method(lam=0.7))
"""

from importlib import import_module

__version__ = "0.1.0"

# which module each public name is in; __init__.pyi says the same to type checkers
_HOME = {"attention": ["Site", "attend", "attend_reference", "attention_probs", "blend", "by_kind", "by_rows",
                       "capture", "dca", "isa", "where"],
         "methods": ["Cosine", "Linear", "Method", "PRESETS", "Run"],
         "reference": ["Reference", "invert", "reconstruct", "replay"],
         "loop": ["Controls", "Guided", "Options", "conditions", "decode", "predict", "sample", "vary"],
         "networks.model": ["Model"],
         "loading.load": ["default_weights", "load"],
         "common.images": ["load_image", "save_png"],
         "common.masks": ["masked"],
         "common.sheets": ["contact_sheet"],
         "common.problem": ["Problem"],
         "evaluation.run": ["evaluate"], "evaluation.systems": ["System"],
         "app.record": ["record"], "app.saved_reference": ["load_reference", "save_reference"]}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    """Import on first use, so that `isadca --help` does not wait for torch."""
    if name in _MODULE:
        return getattr(import_module(f".{_MODULE[name]}", __name__), name)
    raise AttributeError(f"module 'isadca' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
