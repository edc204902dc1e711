"""What is measured of a trained model: clusters of its features and of its memberships, and ranks."""

import functools
from typing import TYPE_CHECKING

import jax
import numpy as np

from subspace_jax import linalg, metrics, train
from subspace_jax.cluster.mlc.core import cluster_membership, numerical_rank

if TYPE_CHECKING:
    from subspace_jax.cluster.mlc.task import ViewsTask

SCORES = ("accuracy", "nmi", "ari")
_RESTARTS = 20

_kmeans = jax.jit(linalg.kmeans, static_argnames=("k", "restarts"))
_clusters = jax.jit(cluster_membership, static_argnames=("k", "kernel", "n_iter", "eta"))


class ClusterQuality(train.Evaluator):
    """Accuracy, NMI and ARI of k-means on the features and of spectral clustering of the memberships of all examples.

    Also numerical ranks of the features: of all (``rank``), and as a mean over the true clusters (``cluster_rank``).

    Args:
      task: The task.
      num_clusters: Number of clusters.
      membership: Arguments of :func:`subspace_jax.cluster.mlc.cluster_membership`: ``eta``, ``kernel``, ``n_iter``.
    """

    sets, reduce, last = ("eval",), "rows", True
    metrics = tuple(f"{way}_{score}" for way in ("kmeans", "spectral") for score in SCORES)
    metrics += ("rank",)

    def __init__(self, task: "ViewsTask", num_clusters: int, membership: dict):
        self._task, self._num_clusters, self._membership = task, num_clusters, membership

    def collect(self, model, batch, *, key):
        """Returns features, cluster features and labels of the examples."""

        def rows(params, variables, batch):
            z, c = self._task.features(params, variables, batch["inputs"])
            return {"z": z, "c": c, "labels": batch["labels"]}

        return train.gathered(self._task, rows)(*model, batch)

    def finish(self, **collected):
        """Clusters both."""
        (rows,) = collected.values()
        keys = jax.random.split(jax.random.key(0))
        of_clusters = functools.partial(_clusters, rows["c"], self._num_clusters, keys[1], **self._membership)
        found = {
            "kmeans": _kmeans(keys[0], rows["z"], k=self._num_clusters, restarts=_RESTARTS).assignments,
            "spectral": of_clusters().assignments,
        }
        scores = {}
        for way, assignments in found.items():
            reached = metrics.cluster_scores(rows["labels"], np.asarray(assignments))
            scores |= {f"{way}_{name}": getattr(reached, name) for name in SCORES}
        ranks = [int(numerical_rank(rows["z"][rows["labels"] == i])) for i in np.unique(rows["labels"])]
        return {**scores, "rank": float(numerical_rank(rows["z"])), "cluster_rank": float(np.mean(ranks))}
