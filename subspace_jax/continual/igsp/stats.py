"""Which task an example belongs to, when nobody says so: distances to the tasks in frozen features."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from subspace_jax import linalg

RIDGE = 1e-3
QUANTILE = 0.95


class TaskStats(NamedTuple):
    """Frozen features of the tasks so far.

    Attributes:
      mean: ``[tasks, d]``.
      scatter: ``[d, d]``, summed over tasks, each about its mean.
      count: ``[tasks]`` float32, examples; 0 for a task that has not come.
      threshold: ``[tasks]``, the distance below which 95 percent of a task's training examples are, when it came.
    """

    mean: jax.Array
    scatter: jax.Array
    count: jax.Array
    threshold: jax.Array


class NearestTask(NamedTuple):
    """The nearest task of each example ``[batch]`` int32, -1 for none near enough, and the distance to it."""

    task: jax.Array
    distance: jax.Array


def init_task_stats(num_tasks: int, width: int) -> TaskStats:
    """Returns statistics of no task yet, float32."""
    zeros = jnp.zeros(num_tasks)
    return TaskStats(jnp.zeros((num_tasks, width)), jnp.zeros((width, width)), zeros, zeros)


def add_task(stats: TaskStats, task: int | jax.Array, features: jax.Array) -> TaskStats:
    """Adds the frozen features of a task's training examples, ``[examples, d]``.

    Raises:
      ValueError: There is no example, or features have another width or NaN.
    """
    if features.ndim != 2 or not features.shape[0] or features.shape[1] != stats.mean.shape[1]:
        raise ValueError(f"features: expected [examples, {stats.mean.shape[1]}], got {features.shape}")
    linalg.check_finite("features", features)
    features = features.astype(stats.mean.dtype)
    mean = jnp.mean(features, axis=0)
    centered = features - mean[None]
    stats = stats._replace(
        mean=stats.mean.at[task].set(mean),
        scatter=stats.scatter + linalg.gram(centered, centered),
        count=stats.count.at[task].set(float(features.shape[0])),
    )
    own = jnp.sum(jnp.square(_whitened(stats, centered)), axis=-1)
    return stats._replace(threshold=stats.threshold.at[task].set(jnp.quantile(jnp.sqrt(own), QUANTILE)))


def nearest_task(stats: TaskStats, features: jax.Array) -> NearestTask:
    """Finds the task with the smallest Mahalanobis distance, by one covariance that all tasks share.

    An example that is farther from it than 95 percent of the task's training examples were belongs to none: the frozen
    model then serves it.

    Args:
      stats: The tasks.
      features: Frozen features ``[batch, d]``.
    """
    x, centers = _whitened(stats, features.astype(stats.mean.dtype)), _whitened(stats, stats.mean)
    distance = jnp.sqrt(linalg.pairwise_sq_distances(x, centers))
    distance = jnp.where((stats.count > 0)[None], distance, jnp.inf)
    task = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    least = jnp.min(distance, axis=-1)
    return NearestTask(jnp.where(least <= stats.threshold[task], task, -1), least)


def _whitened(stats: TaskStats, x: jax.Array) -> jax.Array:
    """``x [n, d]`` in coordinates where the shared covariance, with its ridge, is the identity."""
    width = stats.scatter.shape[0]
    freedom = jnp.maximum(jnp.sum(stats.count) - jnp.sum(stats.count > 0).astype(stats.count.dtype), 1)
    covariance = stats.scatter / freedom
    ridge = RIDGE * jnp.trace(covariance) / width
    ridge = jnp.where(ridge > 0, ridge, jnp.ones_like(ridge))
    factor = jnp.linalg.cholesky(covariance + ridge * jnp.eye(width, dtype=covariance.dtype))
    return solve_triangular(factor, x.T, lower=True).T
