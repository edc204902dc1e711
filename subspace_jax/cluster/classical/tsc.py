"""Thresholding-based subspace clustering: neighbours by the angle of lines."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.linalg import SparseRows
from subspace_jax.linalg.expression_rows import block_of, checked, without_own


def tsc(x: jax.Array, q: int, *, block_size: int | None = None) -> SparseRows:
    """Affinities of each row with the ``q`` others of the largest absolute cosine (Heckel and Boelcskei 2015).

    The affinity is ``exp(-2 arccos |cos|)``.  Cosines are formed by blocks of rows.

    Args:
      x: ``[n, features]``, floating point; lengths do not matter.
      q: Neighbours of a row; few (3 to 20) do well.
      block_size: Rows at a time.

    Returns:
      ``Z [n, q]``, which stand for the affinity ``Z + Z^T``; float32 or wider.

    Raises:
      ValueError: ``x`` is no matrix or (where its values are known) not finite, or ``q`` is not between 1 and
        ``n - 1``.
      TypeError: ``x`` is not floating point.
    """
    x = checked(x)
    if not 1 <= q < x.shape[0]:
        raise ValueError(f"q: expected 1 to {x.shape[0] - 1}, one less than the number of rows, got {q}")
    x = linalg.unit_vectors(x)

    def of_block(block):
        own, at = block
        return jax.lax.top_k(without_own(jnp.abs(linalg.times(own, x.T)), at, -1.0), q)

    n = x.shape[0]
    rows = (x, jnp.arange(n, dtype=jnp.int32))
    cosines, idx = linalg.map_row_blocks(of_block, rows, block_of(n, block_size))
    return SparseRows(idx.astype(jnp.int32), jnp.exp(-2 * jnp.arccos(jnp.clip(cosines, 0, 1))))
