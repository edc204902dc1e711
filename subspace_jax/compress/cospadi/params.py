"""Compression of any parameter tree, kernel by kernel."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.adapters.rules import path_of
from subspace_jax.compress.cospadi.core import compress
from subspace_jax.compress.cospadi.gram import gram_factor

PyTree = Any


def compress_params(
    params: PyTree,
    grams: Mapping[str, jax.Array],
    ratio: float,
    filter: Callable[[str], bool] | None = None,
    **options: Any,
) -> PyTree:
    """Compresses the kernels of a parameter tree for which there are Gram matrices.

    The result serves wherever a model applies kernels by :func:`subspace_jax.nn.linear`, Flax modules included.

    Args:
      params: Tree of arrays; stacked kernels ``[layers, d1, d2]`` take Gram matrices ``[layers, d1, d1]``.
      grams: ``X^T X [d1, d1]`` by the path of the kernel, such as ``"hidden/kernel"``; see :func:`update_gram`.
      ratio: Share of the storage that is removed.
      filter: Whether the kernel at a path is compressed; all in ``grams`` by default.
      **options: Those of :func:`compress`.

    Returns:
      The tree with a :class:`subspace_jax.nn.SparseFactor` for each of these kernels.

    Raises:
      ValueError: A path is none of the tree's, or sizes don't match.
    """
    paths = {path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if strays := sorted(grams.keys() - paths):
        raise ValueError(f"grams: no parameters at {strays}; there are {sorted(paths)[:8]}")

    def one(w, gram):
        return compress(w, gram_factor(gram), ratio, **options)

    def change(path, w):
        name = path_of(path)
        if name not in grams or (filter is not None and not filter(name)):
            return w
        wide = w if w.dtype == jnp.float64 else w.astype(jnp.float32)
        gram = jnp.asarray(grams[name], wide.dtype)
        if w.ndim == 2:
            return one(wide, gram)
        return jax.tree.map(lambda *xs: jnp.stack(xs), *(one(*each) for each in zip(wide, gram, strict=True)))

    return jax.tree_util.tree_map_with_path(change, params)
