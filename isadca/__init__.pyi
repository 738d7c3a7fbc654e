# The public names: what type checkers and editors read, and what __init__.py imports, each on first use.
from .attention import (
    Site as Site, attend as attend, attend_reference as attend_reference, attention_probs as attention_probs,
    blend as blend, by_kind as by_kind, by_rows as by_rows, capture as capture, dca as dca, isa as isa,
    where as where)
from .methods import Cosine as Cosine, Linear as Linear, Method as Method, PRESETS as PRESETS, Run as Run
from .reference import Reference as Reference, invert as invert, reconstruct as reconstruct, replay as replay
from .loop import (
    Controls as Controls, Guided as Guided, Options as Options, conditions as conditions,
    decode as decode, predict as predict, sample as sample, vary as vary)
from .networks.model import Model as Model
from .loading.load import default_weights as default_weights, load as load
from .common.files import save_png as save_png
from .common.images import load_image as load_image
from .common.masks import masked as masked
from .common.sheets import contact_sheet as contact_sheet
from .common.problem import Problem as Problem
from .evaluation.run import evaluate as evaluate
from .evaluation.systems import System as System
from .app.record import record as record
from .app.saved_reference import load_reference as load_reference, save_reference as save_reference

__version__: str
__all__: list[str]
