"""The clusters that coefficients give, and their scores beside those of k-means."""

import functools
from typing import TYPE_CHECKING

import jax
import numpy as np

from subspace_jax import linalg, train
from subspace_jax.cluster.dsc import core
from subspace_jax.metrics import cluster_scores

if TYPE_CHECKING:
    from subspace_jax.cluster.dsc.phases import SelfExpression

SCORES = ("accuracy", "nmi", "ari")
_STARTS = 20


class Clusters(train.Evaluator):
    """Labels of the set "eval", which is one batch in the order of training; scores where it has ``labels``.

    Args:
      task: The task.
    """

    reduce, last, metrics = "rows", True, SCORES

    def __init__(self, task: "SelfExpression"):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns coefficients, images and what there is of true labels."""
        params, _ = model
        found = {"coef": params["coef"], "inputs": batch["inputs"]}
        return {**found, **({"labels": batch["labels"]} if "labels" in batch else {})}

    def finish(self, eval):
        """Returns ``labels`` and, with true ones, ``accuracy``, ``nmi``, ``ari`` and those of k-means on pixels."""
        options, n = self._task.options, len(eval["coef"])
        found = core.coefficient_labels(
            jax.random.key(0), eval["coef"][:, :n], num_clusters=options.num_clusters, keep=options.keep
        )
        values = {"labels": np.asarray(found)}
        if "labels" in eval:
            pixels = _kmeans_labels(eval["inputs"].reshape(n, -1), num_clusters=options.num_clusters)
            for name, labels in (("", values["labels"]), ("kmeans_", np.asarray(pixels))):
                scores = cluster_scores(eval["labels"], labels)
                values |= {name + score: getattr(scores, score) for score in SCORES}
        return values


@functools.partial(jax.jit, static_argnames="num_clusters")
def _kmeans_labels(x, *, num_clusters):
    return linalg.kmeans(jax.random.key(0), x, num_clusters, restarts=_STARTS).assignments
