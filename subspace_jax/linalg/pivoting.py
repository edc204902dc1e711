"""Rows chosen one by one, each farthest from the span of those before: QR with column pivoting of the transpose."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix
from subspace_jax.linalg.products import times


def pivot_rows(x: jax.Array, count: int) -> jax.Array:
    """Pivots of the QR of ``x^T`` with column pivoting (Businger and Golub, 1965).

    A step costs ``n k`` operations; the rows may be sharded.

    Args:
      x: ``[n, k]``, float32 or float64.
      count: Rows to choose, static.

    Returns:
      ``[count]`` int32.  The first of equal ones; beyond the rank of ``x`` any rows.

    Raises:
      ValueError: ``x`` is no matrix, or ``count`` is not between 1 and ``min(n, k)``.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_matrix("x", x)
    if x.ndim != 2:
        raise ValueError(f"x: expected rows [n, k], got shape {x.shape}")
    if not 1 <= count <= min(x.shape):
        raise ValueError(f"count: expected 1 to {min(x.shape)} for rows of shape {x.shape}, got {count}")

    def step(rest, _):
        at = jnp.argmax(jnp.sum(jnp.square(rest), axis=1)).astype(jnp.int32)
        row = rest[at][None]
        length = jnp.sqrt(jnp.sum(jnp.square(row)))
        unit = row / jnp.where(length > 0, length, 1)
        # Twice is enough: rounding leaves no share of the chosen row.
        for _ in range(2):
            rest = rest - times(rest, unit.T) * unit
        return rest, at

    return jax.lax.scan(step, x, None, length=count)[1]
