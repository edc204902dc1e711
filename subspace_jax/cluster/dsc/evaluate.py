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
_STARTS, _KEYS = 20, 10


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
        """Returns ``labels`` and, with true ones, ``accuracy``, ``nmi``, ``ari`` and those of k-means on pixels.

        Those of k-means are means over ten keys, each with the best of 20 starts: on 400 digits two keys differ by up
        to 0.1 in accuracy.
        """
        options, n = self._task.options, len(eval["coef"])
        found = core.coefficient_labels(
            jax.random.key(0), eval["coef"][:, :n], num_clusters=options.num_clusters, keep=options.keep
        )
        values = {"labels": np.asarray(found)}
        if "labels" in eval:
            pixels = np.asarray(_kmeans_labels(eval["inputs"].reshape(n, -1), num_clusters=options.num_clusters))
            for name, runs in (("", [values["labels"]]), ("kmeans_", pixels)):
                scores = [cluster_scores(eval["labels"], labels) for labels in runs]
                values |= {name + score: np.mean([getattr(one, score) for one in scores]) for score in SCORES}
        return values


@functools.partial(jax.jit, static_argnames="num_clusters")
def _kmeans_labels(x, *, num_clusters):
    """Labels by k-means of some keys, ``[keys, n]``."""

    def of_key(key):
        return linalg.kmeans(key, x, num_clusters, restarts=_STARTS).assignments

    return jax.lax.map(of_key, jax.random.split(jax.random.key(0), _KEYS))
