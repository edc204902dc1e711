"""What compatible vectors are worth: retrieval across two models, and what a map changes of the new one."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg, metrics, train
from subspace_jax.represent.lambda_orthogonality.core import backfill_order, class_means

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

    def __init__(self, task):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns vectors, mapped vectors and labels of the examples."""
        del key
        maps = self._task.adapters(*model)
        mapped = {"backward": maps.backward(batch["new"]), "forward": maps.forward(batch["old"])}
        return mapped | {name: batch[name] for name in ("old", "new", "labels")}

    def finish(self, train, eval):
        """Returns CMC-1 and mAP of each pairing, and what is made of them."""
        return jax.device_get(_measures(train, eval, num_classes=int(np.max(train["labels"])) + 1))


@functools.partial(jax.jit, static_argnames="num_classes")
def _measures(
    train: Mapping[str, jax.Array], eval: Mapping[str, jax.Array], *, num_classes: int
) -> dict[str, jax.Array]:
    labels = eval["labels"]
    pairings = {
        "old": (eval["old"], eval["old"]),
        "new": (eval["new"], eval["new"]),
        "raw": (eval["new"], eval["old"]),
        "cross": (eval["backward"], eval["old"]),
        "kept": (eval["backward"], eval["backward"]),
        "forward": (eval["new"], eval["forward"]),
    }
    found = {}
    for name, (query, gallery) in pairings.items():
        if query.shape[1] == gallery.shape[1]:
            found[f"{name}_cmc1"] = metrics.cmc(query, gallery, labels, labels, (1,), exclude_self=True)[0]
            found[f"{name}_map"] = metrics.retrieval_map(query, gallery, labels, labels, exclude_self=True)
    cross, old, new = (found[f"{name}_cmc1"] for name in ("cross", "old", "new"))
    found["update_gain"] = metrics.update_gain(cross, old, new)
    found["kept_minus_new"] = found["kept_cmc1"] - new
    found["distance_correlation"] = distance_correlation(eval["new"], eval["backward"])
    means = class_means(train["forward"], train["labels"], num_classes)
    orders = {
        "backfill_area": backfill_order(eval["forward"], means),
        "random_area": jax.random.permutation(jax.random.key(0), len(labels)),
    }

    def cmc1(gallery):
        return metrics.cmc(eval["new"], gallery, labels, labels, (1,), exclude_self=True)[0]

    for name, order in orders.items():
        _, found[name] = metrics.backfill_curve(cmc1, eval["forward"], eval["new"], order, jnp.asarray(_SHARES))
    return found


def distance_correlation(before: jax.Array, after: jax.Array) -> jax.Array:
    """Pearson correlation of the pairwise distances of vectors before and after a map, a scalar.

    Args:
      before: ``[examples, n]``; all pairs are held, so a sample of some thousand at most.
      after: ``[examples, m]``.
    """
    pairs = np.triu_indices(len(before), 1)
    one, two = (jnp.sqrt(jnp.maximum(linalg.pairwise_sq_distances(x, x), 0))[pairs] for x in (before, after))
    return jnp.corrcoef(one, two)[0, 1]
