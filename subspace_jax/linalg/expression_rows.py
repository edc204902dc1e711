"""What the methods of self-expression share: checks, blocks of rows, and rows without their own entry."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_finite
from subspace_jax.linalg.products import working_dtype
from subspace_jax.linalg.row_blocks import map_row_blocks
from subspace_jax.linalg.sparse_rows import SparseRows, top_entries

_NUMBERS_AT_A_TIME = 2**24


def checked(x: jax.Array, fewest: int = 2) -> jax.Array:
    """Returns rows in float32 or float64; raises for what is no matrix, has too few rows, or is not finite."""
    x = jnp.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x: expected rows [n, features], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected floating point, got {x.dtype}")
    if x.shape[0] < fewest:
        raise ValueError(f"x: expected at least {fewest} rows, got {x.shape[0]}")
    check_finite("x", x)
    return x.astype(working_dtype(x))


def block_of(n: int, block_size: int | None, numbers: int = 1) -> int:
    """Returns the rows of a block: as given, or so many that ``[block, n]`` times ``numbers`` takes some 64 MB."""
    return max(1, min(n, _NUMBERS_AT_A_TIME // (n * numbers))) if block_size is None else block_size


def without_own(scores: jax.Array, own: jax.Array, value: float = 0.0) -> jax.Array:
    """Returns ``scores [block, n]`` with ``value`` at column ``own[i]`` of row ``i``."""
    columns = jnp.arange(scores.shape[1], dtype=own.dtype)
    return jnp.where(columns[None] == own[:, None], jnp.asarray(value, scores.dtype), scores)


def from_blocks(
    of_rows: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, keep: int | None, block_size: int | None
) -> jax.Array | SparseRows:
    """Computes rows of coefficients by blocks, and keeps all or the largest of each.

    Args:
      of_rows: Returns ``[block, n]`` of some rows ``[block, features]`` and their numbers ``[block]``.
      x: All rows, ``[n, features]``.
      keep: Entries of a row to keep; None for all.
      block_size: See :func:`block_of`.
    """
    n = x.shape[0]
    if keep is not None and not 1 <= keep <= n:
        raise ValueError(f"keep: expected 1 to {n}, the number of rows, got {keep}")

    def of_block(block):
        rows = of_rows(*block)
        return rows if keep is None else top_entries(rows, keep)

    return map_row_blocks(of_block, (x, jnp.arange(n, dtype=jnp.int32)), block_of(n, block_size))
