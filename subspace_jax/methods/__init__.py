"""The index of all methods: read by ``subspace-jax methods``, ``scripts/figures.py``, the docs and the tests.

A file for each area; nothing but the standard library is imported, so that it can be searched at once.
"""

from subspace_jax.methods.index import METHODS
from subspace_jax.methods.records import Figure, Method
from subspace_jax.methods.search import find_methods, near_methods, nearest_names

__all__ = ["METHODS", "Figure", "Method", "find_methods", "near_methods", "nearest_names"]


def __dir__():
    return __all__
