"""Square matrices with few entries in each row, as graphs of neighbours have them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SparseRows(NamedTuple):
    """A matrix ``[n, n]`` with at most ``s`` entries in each row (ELLPACK).

    Attributes:
      idx: ``[n, s]`` int32, the columns of the entries.
      val: ``[n, s]``, their values.  A row with fewer entries has values of 0, at any columns; entries of one place
        add up.
    """

    idx: jax.Array
    val: jax.Array


def sparse_times(z: SparseRows, v: jax.Array) -> jax.Array:
    """Returns ``z v`` for ``v [n, p]``, in the dtype of ``v``; holds ``[n, p]`` and no more."""
    # A gather for each entry of a row: one for all would hold [n, s, p].
    out = jnp.zeros_like(v)
    for j in range(z.idx.shape[1]):
        out = out + z.val[:, j, None].astype(v.dtype) * v[z.idx[:, j]]
    return out


def sparse_transpose_times(z: SparseRows, v: jax.Array) -> jax.Array:
    """Returns ``z^T v`` for ``v [n, p]``, in the dtype of ``v``."""
    out = jnp.zeros_like(v)
    for j in range(z.idx.shape[1]):
        out = out.at[z.idx[:, j]].add(z.val[:, j, None].astype(v.dtype) * v)
    return out


def dense_rows(z: SparseRows) -> jax.Array:
    """Returns the matrix ``[n, n]`` itself."""
    n = z.idx.shape[0]
    return jnp.zeros((n, n), z.val.dtype).at[jnp.arange(n)[:, None], z.idx].add(z.val)


def top_entries(rows: jax.Array, count: int) -> SparseRows:
    """Keeps the entries of largest magnitude of each row.

    Args:
      rows: ``[m, n]``, rows of a matrix.
      count: Entries to keep, ``s``.

    Returns:
      ``[m, s]`` each, the largest first, the lower column first of equal ones.

    Raises:
      ValueError: ``count`` is not between 1 and ``n``.
    """
    if not 1 <= count <= rows.shape[1]:
        raise ValueError(f"count: expected 1 to {rows.shape[1]}, the number of columns, got {count}")
    idx = jax.lax.top_k(jnp.abs(rows), count)[1].astype(jnp.int32)
    return SparseRows(idx, jnp.take_along_axis(rows, idx, axis=1))
