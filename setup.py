from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = next(line.split('"')[1] for line in (here / "isadca/__init__.py").read_text().splitlines()
               if line.startswith("__version__"))
# the demo checkpoint and CLIP's vocabulary travel inside the wheel, as isadca/_weights
weights = [str(p.relative_to(here / "weights")) for part in ("demo", "tokenizer")
           for p in sorted((here / "weights" / part).rglob("*")) if p.is_file()]

setup(
    name="isadca",
    version=version,
    description="Image variations by intra-image self-attention, decoupled cross-attention and λ, from scratch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["isadca", "isadca.app", "isadca.common", "isadca.evaluation", "isadca.loading", "isadca.networks",
              "isadca.speed", "isadca._weights"],
    package_dir={"isadca": "isadca", "isadca._weights": "weights"},
    package_data={"isadca": ["py.typed", "*.pyi"], "isadca.app": ["explore.html", "fetch.tsv"],
                  "isadca.loading": ["config_json.tsv"],
                  "isadca._weights": weights},
    install_requires=["torch>=2.10,<2.14", "safetensors>=0.4.3", "tokenizers>=0.20", "pillow>=11", "numpy>=1.26",
                      "tqdm>=4.60", "huggingface_hub>=0.30"],
    extras_require={"test": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "diffusers>=0.40", "transformers>=5",
                             "scikit-image>=0.24"]},
    entry_points={"console_scripts": ["isadca=isadca.app.cli:main"]},
)
