"""Means, covariances and correlations of the units of two networks, summed over batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.linalg import PairMoments


class UnitMoments(NamedTuple):
    """What the sums say about units.

    Attributes:
      count: Examples.
      mean_x: ``[p]``.
      mean_y: ``[q]``.
      std_x: Standard deviations ``[p]``, of ``1 / n``; 0 for a constant unit.
      std_y: ``[q]``.
      cov_xx: Covariances ``[p, p]``, of ``1 / n``.
      cov_xy: ``[p, q]``.
      cov_yy: ``[q, q]``.
      cor_xx: Correlations ``[p, p]``; 0 for constant units.
      cor_xy: ``[p, q]``.
      cor_yy: ``[q, q]``.
    """

    count: jax.Array
    mean_x: jax.Array
    mean_y: jax.Array
    std_x: jax.Array
    std_y: jax.Array
    cov_xx: jax.Array
    cov_xy: jax.Array
    cov_yy: jax.Array
    cor_xx: jax.Array
    cor_xy: jax.Array
    cor_yy: jax.Array


def unit_stats_init(p: int, q: int, dtype: jax.typing.DTypeLike = jnp.float32) -> PairMoments:
    """Sums over no example.

    Args:
      p: Units of the first network.
      q: Units of the second.
      dtype: Dtype of the sums, float32 or float64.

    Raises:
      ValueError: There are no units.
    """
    if p < 1 or q < 1:
        raise ValueError(f"p, q: expected at least one unit each, got {p} and {q}")
    shapes = ((p,), (q,), (p, p), (p, q), (q, q))
    return PairMoments(jnp.zeros((), jnp.int32), *(jnp.zeros(shape, dtype) for shape in shapes))


def unit_stats_update(stats: PairMoments, x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> PairMoments:
    """Adds a batch.

    Deviations are taken from the batch's own mean and the batch is merged by means and deviations (Chan, Golub and
    LeVeque, 1983), so that nothing cancels where means are far from 0.  A batch sharded over examples needs one sum
    over devices.

    Args:
      stats: The sums.
      x: Activations ``[..., p]``, floating point; each position of a convolution's ``[batch, height, width, p]`` is an
        example.
      y: ``[..., q]``, of the same examples.
      mask: ``[...]`` of 1 and 0 for padding; all examples count by default.

    Returns:
      The sums with the batch, in the dtype of ``stats``.

    Raises:
      ValueError: Shapes do not match.
    """
    p, q = stats.xy.shape
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1] or (x.shape[-1], y.shape[-1]) != (p, q):
        raise ValueError(f"x, y: expected [..., {p}] and [..., {q}] of the same examples, got {x.shape} and {y.shape}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask: expected {x.shape[:-1]}, got {mask.shape}")
    dtype = stats.xy.dtype
    x, y = x.reshape(-1, p).astype(dtype), y.reshape(-1, q).astype(dtype)
    batch = linalg.pair_moments(x, y, None if mask is None else mask.reshape(-1))
    return linalg.merge_pair_moments(stats, batch)


def unit_stats_finalize(stats: PairMoments) -> UnitMoments:
    """Covariances and correlations from the sums.

    A unit whose values differ by no more than their rounding is constant: its correlations are 0.

    Args:
      stats: Sums over at least one example; otherwise all is 0.
    """
    count = jnp.maximum(stats.count.astype(stats.xy.dtype), 1)
    covariances = tuple(m / count for m in (stats.xx, stats.xy, stats.yy))
    std_x, std_y = (
        _std(jnp.diagonal(c), mean) for c, mean in ((covariances[0], stats.mean_x), (covariances[2], stats.mean_y))
    )
    pairs = ((std_x, std_x), (std_x, std_y), (std_y, std_y))
    correlations = (_correlation(c, *pair) for c, pair in zip(covariances, pairs, strict=True))
    return UnitMoments(stats.count, stats.mean_x, stats.mean_y, std_x, std_y, *covariances, *correlations)


def between_correlation(x: jax.Array, y: jax.Array) -> jax.Array:
    """Correlations of the units of two networks; of one network's own with ``y = x`` (arXiv 1511.07543, section 3).

    Args:
      x: Activations ``[..., p]``, floating point, see :func:`unit_stats_update`.
      y: ``[..., q]``, of the same examples.

    Returns:
      ``[p, q]`` in ``[-1, 1]``, float32 or wider; 0 for constant units.

    Raises:
      ValueError: Shapes do not match.
    """
    if x.ndim < 2 or y.ndim < 2 or x.shape[:-1] != y.shape[:-1] or 0 in x.shape + y.shape:
        raise ValueError(f"x, y: expected [..., p] and [..., q] of the same examples, got {x.shape} and {y.shape}")
    x, y = (a.reshape(-1, a.shape[-1]).astype(linalg.working_dtype(x, y)) for a in (x, y))
    (x, _), (y, _) = (standardized(a) for a in (x, y))
    return jnp.clip(linalg.gram(x, y) / x.shape[0], -1, 1)


def standardized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns columns ``[n, p]`` of mean 0 and variance 1, of ``1 / n``, or 0 for constant ones; and deviations."""
    x, mean = linalg.centered_columns(x)
    std = _std(jnp.mean(jnp.square(x), axis=0), mean)
    return jnp.where(std[None] > 0, x / jnp.where(std > 0, std, 1)[None], 0), std


def _std(variance: jax.Array, mean: jax.Array) -> jax.Array:
    std = jnp.sqrt(jnp.maximum(variance, 0))
    # Not ">": NaN must stay.
    return jnp.where(std <= 4 * jnp.finfo(std.dtype).eps * jnp.abs(mean), 0, std)


def _correlation(covariance: jax.Array, std_x: jax.Array, std_y: jax.Array) -> jax.Array:
    inverse = (jnp.where(std == 0, 0, 1 / jnp.where(std == 0, 1, std)) for std in (std_x, std_y))
    return jnp.clip(covariance * next(inverse)[:, None] * next(inverse)[None], -1, 1)
