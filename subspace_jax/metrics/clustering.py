"""Agreement of two partitions of the same examples."""

import jax
import jax.numpy as jnp
from optax import assignment

_MEANS = {
    "arithmetic": lambda a, b: (a + b) / 2,
    "geometric": lambda a, b: jnp.sqrt(a * b),
    "max": jnp.maximum,
    "min": jnp.minimum,
}


def normalized_mutual_info(labels: jax.Array, assignments: jax.Array, average: str = "arithmetic") -> jax.Array:
    """Mutual information of two partitions over the mean of their entropies.

    Takes O(N log N) and no table of counts, so that there may be as many parts as examples.

    Args:
      labels: ``[examples]`` integers; which ones does not matter.
      assignments: The same.
      average: Mean of the entropies: ``"arithmetic"``, ``"geometric"`` (as much of the literature before 2020 has it),
        ``"max"`` or ``"min"``.

    Returns:
      A float32 scalar between 0 and 1 (float64 where 64-bit types are on); 1 where both have one part only, 0 where
      one of them has.

    Raises:
      ValueError: Shapes do not match, there is no example, or ``average`` is unknown.
    """
    if average not in _MEANS:
        raise ValueError(f"average: expected one of {', '.join(_MEANS)}, got {average!r}")
    if labels.ndim != 1 or labels.shape != assignments.shape or not labels.size:
        raise ValueError(f"labels, assignments: expected [examples] alike, got {labels.shape} and {assignments.shape}")
    labels, assignments = jnp.asarray(labels), jnp.asarray(assignments)
    of_labels, of_parts = _entropy(labels), _entropy(assignments)
    shared = of_labels + of_parts - _entropy(labels, assignments)
    whole = _MEANS[average](of_labels, of_parts)
    both = jnp.where(jnp.maximum(of_labels, of_parts) > 0, 0.0, 1.0)
    return jnp.where(whole > 0, jnp.clip(shared / jnp.where(whole > 0, whole, 1), 0, 1), both)


def match_assignments(previous: jax.Array, current: jax.Array, num_clusters: int) -> jax.Array:
    """Renames the clusters of an assignment so that it agrees best with an earlier one.

    The new names have the least sum of L1 distances between the indicator vectors of matched clusters (Hungarian
    algorithm).  An entry outside ``0 .. num_clusters - 1``, such as -1, is in no cluster, and keeps its value.

    Args:
      previous: ``[examples]`` integers.
      current: ``[examples]`` integers.
      num_clusters: Clusters in each; static.

    Returns:
      ``current`` with other names, int32.

    Raises:
      ValueError: Shapes do not match, or there is no cluster.
    """
    if current.ndim != 1 or previous.shape != current.shape:
        raise ValueError(f"previous, current: expected [examples] alike, got {previous.shape} and {current.shape}")
    if num_clusters < 1:
        raise ValueError(f"num_clusters: expected at least 1, got {num_clusters}")
    before, now = (jax.nn.one_hot(x, num_clusters, dtype=jnp.float32) for x in (previous, current))
    both = jnp.matmul(now.T, before, precision=jax.lax.Precision.HIGHEST)
    costs = jnp.sum(now, axis=0)[:, None] + jnp.sum(before, axis=0)[None] - 2 * both
    rows, columns = assignment.hungarian_algorithm(costs)
    names = jnp.zeros(num_clusters, jnp.int32).at[rows].set(columns.astype(jnp.int32))
    current = jnp.asarray(current).astype(jnp.int32)
    inside = (current >= 0) & (current < num_clusters)
    return jnp.where(inside, names[jnp.where(inside, current, 0)], current)


def _entropy(*columns: jax.Array) -> jax.Array:
    """Returns the entropy, in nats, of the partition of examples by equal entries in all columns."""
    order = jnp.lexsort(columns)
    columns = [column[order] for column in columns]
    differs = jnp.stack([column[1:] != column[:-1] for column in columns]).any(axis=0)
    part = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(differs, dtype=jnp.int32)])
    count = order.shape[0]
    share = jax.ops.segment_sum(jnp.ones(count), part, count, indices_are_sorted=True) / count
    return -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0))
