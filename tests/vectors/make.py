"""Write all vectors anew: python tests/vectors/make.py

Nothing here imports isadca. It needs NumPy, torch, diffusers and transformers, takes some 20 seconds, and gives the
same files on every machine up to the last digits of float64.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from safetensors.numpy import save_file

import make_algorithm
import make_ddim
import make_equations
import make_metrics
import make_networks
import make_pictures
import make_text
from cases import HERE, Case, distance, write

torch.set_num_threads(1)  # the tensors are small
MAKERS = {"equations": make_equations, "ddim": make_ddim, "networks": make_networks, "algorithm": make_algorithm,
          "pictures": make_pictures, "text": make_text, "metrics": make_metrics}


def cases() -> dict[str, list[Case]]:
    """All cases by file. What a mistake would give has to be far from what is right."""
    made = {name: list(maker.cases()) for name, maker in MAKERS.items()}
    for case in (case for some in made.values() for case in some):
        for what, wrong in case.mistakes.items():
            if not distance(wrong, case.expected) > 3 * case.tolerance:
                raise ValueError(f"{case.function}, {case.name}: {what!r} cannot be told from what is right")
    return made


def model_files() -> dict[str, dict]:
    """All files of the tiny model: path -> arrays, or settings of a JSON file."""
    return make_networks.model_files() | make_metrics.weights()


def main() -> None:
    for name, content in model_files().items():
        path = HERE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            save_file(content, path)
    for name, some in cases().items():
        write(HERE / f"{name}.safetensors", some)
        print(f"{name}: {len(some)} vectors")
    for path in HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
