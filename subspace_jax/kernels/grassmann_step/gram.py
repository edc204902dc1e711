"""Inner products of the columns of many tall, narrow matrices."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from subspace_jax import linalg

_ROWS = 32  # in a block, whose sum of outer products is made at once


def tall_gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """``X^T Y``, as :func:`subspace_jax.linalg.gram`, faster on CPUs where matrices are tall and narrow.

    XLA runs a batch of small products on one core there, and packs each; sums of rows times rows are elementwise work,
    which all cores share and which becomes vector code.

    Args:
      x: ``[..., n, k]``, float32 or float64.
      y: ``[..., n, k]``, same dtype.

    Returns:
      ``[..., k, k]``.
    """
    n, k = x.shape[-2:]
    # With fewer blocks XLA would fuse the two sums into one, and with more columns its products are the faster.
    if k > 8 or n % _ROWS or n // _ROWS < 16:
        return linalg.gram(x, y)
    return jax.lax.platform_dependent(x, y, cpu=_by_rows, default=linalg.gram)


def _by_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    *lead, n, k = x.shape
    x, y = (a.reshape(*lead, n // _ROWS, _ROWS, k) for a in (x, y))
    return _sum_of_all(_sum(x[..., i, :, None] * y[..., i, None, :] for i in range(_ROWS)))


def _sum_of_all(blocks: jax.Array) -> jax.Array:
    """Sum over axis -3, written out: as a reduction it would take the products above into its scalar loop."""
    count = blocks.shape[-3]
    if count <= 64:
        return _sum(blocks[..., i, :, :] for i in range(count))
    groups, rest = jnp.split(blocks, [count // 32 * 32], axis=-3)
    groups = groups.reshape(*groups.shape[:-3], count // 32, 32, *groups.shape[-2:])
    sums = _sum(groups[..., i, :, :] for i in range(32))
    return _sum_of_all(jnp.concatenate([sums, rest], axis=-3))


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)
