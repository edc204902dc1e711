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
    if not _splits(x):
        return linalg.gram(x, y)
    return jax.lax.platform_dependent(x, y, cpu=lambda x, y: _sum_of_all(_blocks(x, y)), default=linalg.gram)


def defect(s: jax.Array, shares: int = 1) -> jax.Array:
    """``S^T S - I``, to a small part of a rounding of ``I`` where S is all but orthonormal.

    Each part of the sum gives up its share of the identity before they are added, so that no sum comes near 1.

    Args:
      s: ``[..., n, k]``, float32 or float64.
      shares: Where S is one of so many parts of the rows, it is ``S^T S - I / shares`` that is returned.

    Returns:
      ``[..., k, k]``.
    """
    by_diagonal = functools.partial(_by_diagonal, shares=shares)
    if not _splits(s):
        return by_diagonal(s)
    return jax.lax.platform_dependent(s, cpu=functools.partial(_by_blocks, shares=shares), default=by_diagonal)


def _by_blocks(s: jax.Array, shares: int) -> jax.Array:
    blocks = _blocks(s, s)
    return _sum_of_all(blocks - linalg.eye_like(blocks) / (blocks.shape[-3] * shares))


def _by_diagonal(s: jax.Array, shares: int) -> jax.Array:
    square = linalg.gram(s, s)
    lengths = jnp.sum(s * s - 1 / (s.shape[-2] * shares), axis=-2)
    eye = linalg.eye_like(square)
    return square * (1 - eye) + lengths[..., None] * eye


def _splits(x: jax.Array) -> bool:
    n, k = x.shape[-2:]
    # With fewer blocks XLA would fuse the two sums into one, and with more columns its products are the faster.
    return k <= 8 and n % _ROWS == 0 and n // _ROWS >= 16


def _blocks(x: jax.Array, y: jax.Array) -> jax.Array:
    *lead, n, k = x.shape
    x, y = (a.reshape(*lead, n // _ROWS, _ROWS, k) for a in (x, y))
    return _sum(x[..., i, :, None] * y[..., i, None, :] for i in range(_ROWS))


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
