"""Functions of rows that are applied to some rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_row_blocks(f: Callable[[Any], Any], rows: Any, block_size: int) -> Any:
    """Applies a function of blocks of rows to all rows, one block after the other.

    A block takes every so-manieth row: where the rows are sharded, each device computes its own of a block.

    Args:
      f: Takes arrays ``[block, ...]`` and returns arrays ``[block, ...]``, each row a function of the row alone.
      rows: A pytree of arrays ``[n, ...]``.
      block_size: Rows of a block, static.  The last block is padded with zeros.

    Returns:
      What ``f`` returns, ``[n, ...]``.

    Raises:
      ValueError: ``block_size`` is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= block_size:
        return f(rows)
    blocks = -(-count // block_size)

    def grouped(x):
        x = jnp.pad(x, [(0, blocks * block_size - count)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(block_size, blocks, *x.shape[1:]), 0, 1)

    found = jax.lax.map(f, jax.tree.map(grouped, rows))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:count], found)
