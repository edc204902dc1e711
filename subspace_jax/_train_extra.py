"""Imported by what needs the extra ``train``: raises an error that names the extra where a package is missing."""

import importlib.util

PACKAGES = (
    "array_record",
    "flax",
    "grain",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "orbax",
    "PIL",
    "regex",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "tokenizers",
    "tqdm",
)

if _missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    raise ImportError(
        "models, data, training and the command need packages that are not installed "
        f"({', '.join(_missing)}): pip install 'subspace-jax[train]'"
    )
