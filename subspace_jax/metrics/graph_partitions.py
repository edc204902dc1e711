"""How well a partition cuts a graph: NumPy in float64, on the host."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def graph_modularity(adjacency: Any, labels: ArrayLike, resolution: float = 1.0) -> float:
    """Newman's modularity: the share of weight within clusters, less what random edges of the same degrees have.

    Args:
      adjacency: Symmetric SciPy sparse array ``[n, n]``, not negative.  Self-loops are left out.
      labels: ``[n]`` integers.
      resolution: Weight of what random edges have.

    Returns:
      Between -1 and 1; 0 of a graph without edges.

    Raises:
      ValueError: The shapes do not match.
    """
    within, volume = _weights(adjacency, labels)
    total = volume.sum()
    return float(within.sum() / total - resolution * np.square(volume / total).sum()) if total else 0.0


def graph_conductance(adjacency: Any, labels: ArrayLike) -> float:
    """Mean over clusters of the weight that leaves a cluster, divided by that of its edges or of all others, the less.

    Arguments and errors: see :func:`graph_modularity`.  A cluster without an edge, and one that has all, counts 0.
    """
    within, volume = _weights(adjacency, labels)
    least = np.minimum(volume, volume.sum() - volume)
    return float(np.mean(np.where(least > 0, (volume - within) / np.where(least > 0, least, 1), 0)))


def _weights(adjacency, labels):
    """Of each cluster, the weight of its inner edges (both directions) and of all edges of its nodes."""
    labels = np.asarray(labels)
    if adjacency.shape != (len(labels), len(labels)) or labels.ndim != 1:
        raise ValueError(
            f"labels: expected one of each node of adjacency {list(adjacency.shape)}, got {list(labels.shape)}"
        )
    edges = adjacency.tocoo()
    source, target = edges.coords
    names, part = np.unique(labels, return_inverse=True)
    weight = np.where(source == target, 0, edges.data).astype(np.float64)
    same = part[source] == part[target]
    count = len(names)
    within = np.bincount(part[source], weight * same, minlength=count)
    return within, np.bincount(part[source], weight, minlength=count)
