"""K-means clustering."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_integer
from subspace_jax.linalg.nearest import pairwise_sq_distances
from subspace_jax.linalg.products import gram, working_dtype


class KMeans(NamedTuple):
    """A clustering of rows.

    Attributes:
      centers: ``[k, n]``, the means of the clusters.
      assignments: ``[rows]`` int32, the nearest center of each row.
      inertia: ``[]``, the sum of squared distances of the rows to their centers.
    """

    centers: jax.Array
    assignments: jax.Array
    inertia: jax.Array


def kmeans(key: jax.Array, x: jax.Array, k: int, *, restarts: int = 1, max_steps: int = 100) -> KMeans:
    """Lloyd's algorithm from k-means++ starts (Arthur and Vassilvitskii, SODA 2007).

    A step costs ``rows x k x n`` operations and holds ``[rows, k]`` distances; the rows may be sharded.  A start ends
    when no assignment changes.  A cluster that loses all rows takes the row farthest from its center as its own.

    Args:
      key: Key of the starts.
      x: ``[rows, n]``, floating point.
      k: Number of clusters.
      restarts: Number of starts, of which the one with the least inertia is returned.
      max_steps: Most steps of a start.

    Returns:
      Centers, assignments and inertia; float32 or wider.

    Raises:
      ValueError: ``x`` is no matrix, or ``k``, ``restarts`` or ``max_steps`` is out of range.
      TypeError: ``k`` or ``restarts`` is no integer.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected [rows, n], got shape {x.shape}")
    k, restarts = check_integer("k", k), check_integer("restarts", restarts)
    if not 1 <= k <= x.shape[0]:
        raise ValueError(f"k: expected 1 to {x.shape[0]}, the number of rows, got {k}")
    if restarts < 1 or max_steps < 1:
        raise ValueError(f"restarts, max_steps: expected at least 1, got {restarts} and {max_steps}")
    x = x.astype(working_dtype(x))
    mean = jnp.mean(x, axis=0, keepdims=True)
    centered = x - mean  # distances come from inner products, which far from the origin are rounded more
    found = jax.lax.map(lambda key: _start(key, centered, k, max_steps), jax.random.split(key, restarts))
    best = jax.tree.map(lambda a: a[jnp.argmin(found.inertia)], found)
    return best._replace(centers=best.centers + mean)


def _start(key: jax.Array, x: jax.Array, k: int, max_steps: int) -> KMeans:
    centers = _plus_plus(key, x, k)

    # Below it a distance is rounding alone, as between rows that coincide, and no reason to move a center.
    least = 1e2 * jnp.finfo(x.dtype).eps * jnp.max(jnp.sum(jnp.square(x), axis=1))

    def assign(centers):
        distances = pairwise_sq_distances(x, centers)
        return jnp.argmin(distances, axis=1).astype(jnp.int32), jnp.min(distances, axis=1)

    def step(carry):
        centers, assignments, distances, _, steps = carry
        members = jax.nn.one_hot(assignments, k, dtype=x.dtype)
        sizes = jnp.sum(members, axis=0)[:, None]
        centers = jnp.where(sizes > 0, gram(members, x) / jnp.maximum(sizes, 1), centers)
        empty = sizes[:, 0] == 0
        centers = jax.lax.cond(jnp.any(empty), lambda c: _moved(c, empty, x, distances, least), lambda c: c, centers)
        now, distances = assign(centers)
        return centers, now, distances, jnp.any(now != assignments), steps + 1

    start = (centers, *assign(centers), jnp.bool_(True), jnp.int32(0))
    centers, assignments, distances, _, _ = jax.lax.while_loop(lambda c: c[3] & (c[4] < max_steps), step, start)
    return KMeans(centers, assignments, jnp.sum(distances))


def _moved(centers: jax.Array, empty: jax.Array, x: jax.Array, distances: jax.Array, least: jax.Array) -> jax.Array:
    """Moves the centers of empty clusters to the rows that are farthest from theirs."""
    farthest, rows = jax.lax.top_k(distances, centers.shape[0])
    turn = jnp.maximum(jnp.cumsum(empty) - 1, 0)
    return jnp.where((empty & (farthest[turn] > least))[:, None], x[rows[turn]], centers)


def _plus_plus(key: jax.Array, x: jax.Array, k: int) -> jax.Array:
    """Draws rows as centers, each with probability in proportion to its squared distance to those drawn before."""
    first, *_ = keys = jax.random.split(key, k)
    at = jax.random.randint(first, (), 0, x.shape[0])

    def draw(distances, key):
        # Where all rows coincide with centers, any row will do.
        weights = jnp.where(jnp.max(distances) > 0, distances, 1.0)
        at = jax.random.categorical(key, jnp.log(weights))
        nearer = jnp.minimum(distances, jnp.sum(jnp.square(x - x[at][None]), axis=1))
        return nearer, x[at]

    _, rest = jax.lax.scan(draw, jnp.sum(jnp.square(x - x[at][None]), axis=1), keys[1:])
    return jnp.concatenate([x[at][None], rest])
