"""First and second moments of paired vectors, summed over blocks and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg.products import gram, working_dtype


class PairMoments(NamedTuple):
    """First and second moments of pairs of vectors.

    Attributes:
      count: Number of pairs, int32.
      mean_x: ``[p]``, float32 or float64.
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


def pair_moments(x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> PairMoments:
    """Moments of pairs, which may be sharded over devices.

    Deviations are taken from the mean of these pairs, so that nothing cancels where means are far from 0.

    Args:
      x: ``[n, p]``, floating point.
      y: ``[n, q]``, example by example with ``x``.
      mask: ``[n]`` of 1 and 0 for padding, which may hold anything; all pairs count by default.

    Returns:
      Moments in float32, or float64 if an array is.

    Raises:
      ValueError: Shapes do not match.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x, y: expected pairs [n, p] and [n, q], got {x.shape} and {y.shape}")
    if mask is not None and mask.shape != x.shape[:1]:
        raise ValueError(f"mask: expected {x.shape[:1]}, got {mask.shape}")
    dtype = working_dtype(x, y)
    there = jnp.ones((x.shape[0], 1), bool) if mask is None else mask[:, None].astype(bool)
    count = jnp.sum(there, dtype=jnp.int32)
    (x, mean_x), (y, mean_y) = (_deviations(a.astype(dtype), there, count) for a in (x, y))
    return PairMoments(count, mean_x, mean_y, gram(x, x), gram(x, y), gram(y, y))


def merge_pair_moments(a: PairMoments, b: PairMoments) -> PairMoments:
    """Moments of two sets of pairs together (Chan, Golub and LeVeque, 1983); either may be empty."""
    dtype = a.xy.dtype
    of_a, of_b = a.count.astype(dtype), b.count.astype(dtype)
    share = of_b / jnp.maximum(of_a + of_b, 1)
    dx, dy = b.mean_x - a.mean_x, b.mean_y - a.mean_y
    weight = of_a * share
    return PairMoments(
        a.count + b.count,
        a.mean_x + share * dx,
        a.mean_y + share * dy,
        a.xx + b.xx + weight * jnp.outer(dx, dx),
        a.xy + b.xy + weight * jnp.outer(dx, dy),
        a.yy + b.yy + weight * jnp.outer(dy, dy),
    )


def psum_pair_moments(moments: PairMoments, axis_name: str) -> PairMoments:
    """Merges the moments of the devices along a mesh axis, inside ``shard_map``: one collective after all blocks."""
    dtype = moments.xy.dtype
    count = moments.count.astype(dtype)
    total = jnp.maximum(jax.lax.psum(count, axis_name), 1)
    mean_x, mean_y = (jax.lax.psum(count * m, axis_name) / total for m in (moments.mean_x, moments.mean_y))
    dx, dy = moments.mean_x - mean_x, moments.mean_y - mean_y
    sums = (
        moments.xx + count * jnp.outer(dx, dx),
        moments.xy + count * jnp.outer(dx, dy),
        moments.yy + count * jnp.outer(dy, dy),
    )
    return PairMoments(jax.lax.psum(moments.count, axis_name), mean_x, mean_y, *jax.lax.psum(sums, axis_name))


def _deviations(x: jax.Array, there: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.maximum(count, 1).astype(x.dtype)
    x = jnp.where(there, x, 0)
    mean = jnp.sum(x, axis=0, keepdims=True) / total
    once = jnp.where(there, x - mean, 0)
    # The mean of values far from 0 is rounded; what is left of it is not.
    rest = jnp.sum(once, axis=0, keepdims=True) / total
    return jnp.where(there, once - rest, 0), (mean + rest)[0]
