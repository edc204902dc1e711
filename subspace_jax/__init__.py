"""Subspace methods in JAX: manifolds, Optax transforms, adapters, and a train loop that shards.

Subpackages load on first use, so that ``import subspace_jax`` is fast and touches no device.
"""

import importlib

__version__ = "0.1.0"

_SUBPACKAGES = (
    "adapters",
    "anomaly",
    "cli",
    "cluster",
    "compress",
    "continual",
    "data",
    "interop",
    "interpret",
    "kernels",
    "language",
    "linalg",
    "losses",
    "manifolds",
    "merge",
    "methods",
    "metrics",
    "nn",
    "optim",
    "planning",
    "represent",
    "train",
)

__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str):
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
