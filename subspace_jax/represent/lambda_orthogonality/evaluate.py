"""What compatible vectors are worth: retrieval across two models, and what a map changes of the new one."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg, metrics, train
from subspace_jax.represent.lambda_orthogonality.core import backfill_order, class_means

if TYPE_CHECKING:
    from subspace_jax.represent.lambda_orthogonality.task import CompatTask

_SHARES = tuple(i / 10 for i in range(11))


class Retrieval(train.Evaluator):
    """Retrieval within and across both models: a query is each example of a set, the others are its gallery.

    The backward map is measured by new queries in the old gallery ("cross") and in a gallery that it made itself
    ("kept"); the forward map by new queries in the mapped old gallery ("forward"), and by the area under the curve of
    such a gallery that is re-embedded item by item, worst first and in random order.

    Args:
      task: The task, which has ``adapters(params, variables)``.
    """

    sets, reduce = ("train", "eval"), "rows"
    metrics = ("cross_cmc1", "cross_map", "forward_cmc1", "backfill_area")

    def __init__(self, task: "CompatTask"):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns vectors, mapped vectors and labels of the examples."""
        del key
        maps = self._task.adapters(*model)
        mapped = {"backward": maps.backward(batch["new"]), "forward": maps.forward(batch["old"])}
        return mapped | {name: batch[name] for name in ("old", "new", "labels")}

    def finish(self, train, eval):
        """Returns CMC-1 and mAP of each pairing, and what is made of them."""
        labels, old, new = (eval[name] for name in ("labels", "old", "new"))
        backward, forward = eval["backward"], eval["forward"]
        pairings = {
            "old": (old, old),
            "new": (new, new),
            "raw": (new, old),
            "cross": (backward, old),
            "kept": (backward, backward),
            "forward": (new, forward),
        }
        found = {}
        for name, (query, gallery) in pairings.items():
            if query.shape[1] == gallery.shape[1]:
                found[f"{name}_cmc1"], found[f"{name}_map"] = _scores(query, gallery, labels)
        cross, old_cmc1, new_cmc1 = (found[f"{name}_cmc1"] for name in ("cross", "old", "new"))
        found["update_gain"] = metrics.update_gain(cross, old_cmc1, new_cmc1)
        found["kept_minus_new"] = found["kept_cmc1"] - new_cmc1
        found["distance_correlation"] = distance_correlation(new, backward)
        means = class_means(train["forward"], train["labels"], int(np.max(train["labels"])) + 1)
        worst_first = backfill_order(forward, means)
        found["backfill_area"] = _area(forward, new, worst_first, labels)
        random = np.random.default_rng(0).permutation(len(labels)).astype(np.int32)
        found["random_area"] = _area(forward, new, random, labels)
        return jax.device_get(found)


@jax.jit
def _scores(query: jax.Array, gallery: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns CMC-1 and mAP of examples among the others."""
    cmc1 = metrics.cmc(query, gallery, labels, labels, (1,), exclude_self=True)[0]
    return cmc1, metrics.retrieval_map(query, gallery, labels, labels, exclude_self=True)


@jax.jit
def _area(mapped: jax.Array, new: jax.Array, order: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the area under the curve of CMC-1 while a gallery is re-embedded in an order."""

    def cmc1(gallery):
        return metrics.cmc(new, gallery, labels, labels, (1,), exclude_self=True)[0]

    return metrics.backfill_curve(cmc1, mapped, new, order, jnp.asarray(_SHARES))[1]


@jax.jit
def distance_correlation(before: jax.Array, after: jax.Array) -> jax.Array:
    """Pearson correlation of the pairwise distances of vectors before and after a map, a scalar.

    Args:
      before: ``[examples, n]``; all pairs are held, so a sample of some thousand at most.
      after: ``[examples, m]``.
    """
    pairs = np.triu_indices(len(before), 1)
    one, two = (jnp.sqrt(jnp.maximum(linalg.pairwise_sq_distances(x, x), 0))[pairs] for x in (before, after))
    return jnp.corrcoef(one, two)[0, 1]
