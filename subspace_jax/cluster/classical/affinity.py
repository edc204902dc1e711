"""From coefficients of self-expression to the affinity of a graph."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.linalg import SparseRows


def keep_top_coefficients(c: jax.Array, d: int) -> SparseRows:
    """Keeps the ``d`` entries of largest magnitude of each row of ``c [n, n]``.

    Raises:
      ValueError: ``c`` is not square, or ``d`` is not between 1 and ``n``.
    """
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise ValueError(f"c: expected a square matrix [n, n], got {c.shape}")
    return linalg.top_entries(c, d)


def affinity_from_coefficients(c: jax.Array | SparseRows, keep: int | None = None) -> jax.Array | SparseRows:
    """The affinity ``(|R| + |R|^T) / 2`` of coefficients, where ``R`` are their rows divided by their lengths.

    Args:
      c: ``[n, n]``, or :class:`SparseRows`.
      keep: Entries of each row of an array to keep; None for all.

    Returns:
      ``[n, n]``; or :class:`SparseRows` ``Z``, which stand for ``Z + Z^T``, where ``c`` is sparse or entries are kept.
      A row of zeros stays zero.

    Raises:
      ValueError: ``c`` is not square, ``keep`` is not between 1 and ``n``, or ``c`` is sparse and ``keep`` is given.
    """
    if isinstance(c, SparseRows):
        if keep is not None:
            raise ValueError(f"keep: expected None for sparse coefficients, got {keep}")
        return SparseRows(c.idx, jnp.abs(linalg.unit_vectors(c.val)) / 2)
    if keep is not None:
        return affinity_from_coefficients(keep_top_coefficients(c, keep))
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise ValueError(f"c: expected a square matrix [n, n], got {c.shape}")
    half = jnp.abs(linalg.unit_vectors(c)) / 2
    return half + half.T


def neighbor_affinity(x: jax.Array, q: int) -> SparseRows:
    """The graph of nearest neighbours in Euclidean distance: 1/2 for each neighbour of a row.

    Arguments: see :func:`tsc`.

    Returns:
      ``Z [n, q]``, which stand for ``Z + Z^T``: 1 for two rows that are neighbours of each other, 1/2 where only one
      is a neighbour of the other.

    Raises:
      ValueError: See :func:`tsc`.
    """
    if x.ndim != 2 or not 1 <= q < x.shape[0]:
        raise ValueError(f"q: expected 1 to one less than the number of rows, got {q} for x of shape {x.shape}")
    _, idx = linalg.nearest_rows(x, x, q, exclude=jnp.arange(x.shape[0]))
    return SparseRows(idx, jnp.full(idx.shape, 0.5, linalg.working_dtype(x)))
