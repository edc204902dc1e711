"""Between the rows ``(sum k, n)`` that the golden files store and bases ``[classes, n, k]``."""

import itertools

import jax.numpy as jnp
import numpy as np


def to_bases(rows, dims):
    """Groups of equal dimension, in rising order, of rows ``(..., sum k, n)``."""
    offsets = np.cumsum([0, *dims])
    blocks = [np.swapaxes(rows[..., a:b, :], -1, -2) for a, b in itertools.pairwise(offsets)]
    groups = {k: [i for i, d in enumerate(dims) if d == k] for k in sorted(set(map(int, dims)))}
    return {f"k{k}": jnp.asarray(np.stack([blocks[i] for i in members], axis=-3)) for k, members in groups.items()}


def to_rows(groups, dims):
    """The inverse of :func:`to_bases`."""
    seen = dict.fromkeys(groups, 0)
    rows = []
    for d in map(int, dims):
        group = groups[f"k{d}"]
        rows.append(np.swapaxes(np.asarray(group[..., seen[f"k{d}"], :, :]), -1, -2))
        seen[f"k{d}"] += 1
    return np.concatenate(rows, axis=-2)
