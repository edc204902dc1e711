"""Means, covariances and correlations of the units of two networks, summed over batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg import gram, working_dtype


class UnitStats(NamedTuple):
    """Sums over the examples seen so far.

    Attributes:
      count: Examples, int32.
      mean_x: ``[p]`` float32 or float64.
      mean_y: ``[q]``.
      xx: Sum ``[p, p]`` of products of deviations from the mean.
      xy: ``[p, q]``, likewise.
      yy: ``[q, q]``.
    """

    count: jax.Array
    mean_x: jax.Array
    mean_y: jax.Array
    xx: jax.Array
    xy: jax.Array
    yy: jax.Array


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


def unit_stats_init(p: int, q: int, dtype: jax.typing.DTypeLike = jnp.float32) -> UnitStats:
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
    return UnitStats(jnp.zeros((), jnp.int32), *(jnp.zeros(shape, dtype) for shape in shapes))


def unit_stats_update(stats: UnitStats, x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> UnitStats:
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
    weight = jnp.ones((x.shape[0], 1), dtype) if mask is None else mask.reshape(-1, 1).astype(dtype)
    count = jnp.sum(weight)
    (x, mean_x), (y, mean_y) = (_deviations(a, weight, jnp.maximum(count, 1)) for a in (x, y))
    batch = UnitStats(count.astype(jnp.int32), mean_x, mean_y, gram(x, x), gram(x, y), gram(y, y))
    return unit_stats_merge(stats, batch)


def unit_stats_merge(a: UnitStats, b: UnitStats) -> UnitStats:
    """Sums over the examples of both."""
    dtype = a.xy.dtype
    of_a, of_b = a.count.astype(dtype), b.count.astype(dtype)
    share = of_b / jnp.maximum(of_a + of_b, 1)
    dx, dy = b.mean_x - a.mean_x, b.mean_y - a.mean_y
    weight = of_a * share
    return UnitStats(
        a.count + b.count,
        a.mean_x + share * dx,
        a.mean_y + share * dy,
        a.xx + b.xx + weight * jnp.outer(dx, dx),
        a.xy + b.xy + weight * jnp.outer(dx, dy),
        a.yy + b.yy + weight * jnp.outer(dy, dy),
    )


def unit_stats_psum(stats: UnitStats, axis_name: str) -> UnitStats:
    """Merges the sums of the devices along a mesh axis, inside ``shard_map``: one collective after all batches."""
    dtype = stats.xy.dtype
    count = stats.count.astype(dtype)
    total = jax.lax.psum(count, axis_name)
    mean_x, mean_y = (jax.lax.psum(count * m, axis_name) / jnp.maximum(total, 1) for m in (stats.mean_x, stats.mean_y))
    dx, dy = stats.mean_x - mean_x, stats.mean_y - mean_y
    sums = (
        stats.xx + count * jnp.outer(dx, dx),
        stats.xy + count * jnp.outer(dx, dy),
        stats.yy + count * jnp.outer(dy, dy),
    )
    return UnitStats(jax.lax.psum(stats.count, axis_name), mean_x, mean_y, *jax.lax.psum(sums, axis_name))


def unit_stats_finalize(stats: UnitStats) -> UnitMoments:
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
    x, y = (a.reshape(-1, a.shape[-1]).astype(working_dtype(x, y)) for a in (x, y))
    (x, _), (y, _) = (standardized(a) for a in (x, y))
    return jnp.clip(gram(x, y) / x.shape[0], -1, 1)


def standardized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns columns ``[n, p]`` of mean 0 and variance 1, of ``1 / n``, or 0 for constant ones; and deviations."""
    weight = jnp.ones((x.shape[0], 1), x.dtype)
    x, mean = _deviations(x, weight, jnp.asarray(x.shape[0], x.dtype))
    std = _std(jnp.mean(jnp.square(x), axis=0), mean)
    return jnp.where(std[None] > 0, x / jnp.where(std > 0, std, 1)[None], 0), std


def _deviations(x: jax.Array, weight: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Padding may hold anything.
    x = jnp.where(weight > 0, x, 0)
    mean = jnp.sum(x, axis=0, keepdims=True) / count
    once = (x - mean) * weight
    # The mean of values far from 0 is rounded; what is left of it is not.
    rest = jnp.sum(once, axis=0, keepdims=True) / count
    return (once - rest) * weight, (mean + rest)[0]


def _std(variance: jax.Array, mean: jax.Array) -> jax.Array:
    std = jnp.sqrt(jnp.maximum(variance, 0))
    # Not ">": NaN must stay.
    return jnp.where(std <= 4 * jnp.finfo(std.dtype).eps * jnp.abs(mean), 0, std)


def _correlation(covariance: jax.Array, std_x: jax.Array, std_y: jax.Array) -> jax.Array:
    inverse = (jnp.where(std == 0, 0, 1 / jnp.where(std == 0, 1, std)) for std in (std_x, std_y))
    return jnp.clip(covariance * next(inverse)[:, None] * next(inverse)[None], -1, 1)
