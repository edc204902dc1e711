"""Accuracies of merged models task by task, beside those of simple merges."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from subspace_jax import train
from subspace_jax.merge.subspace_fusion.concrete import prediction_entropy
from subspace_jax.merge.subspace_fusion.core import apply_task_vectors
from subspace_jax.merge.subspace_fusion.ties import ties_merge

if TYPE_CHECKING:
    from subspace_jax.merge.subspace_fusion.task import FusionTask

_SIMPLE = ("base", "average", "task_arithmetic", "ties")


class MergedAccuracy(train.Evaluator):
    """The merged model on every task, with the base, the models themselves, their average, task arithmetic and TIES.

    Task arithmetic and TIES have the coefficient that trained ones start at.

    Args:
      task: The task.
    """

    metrics = ("accuracy", "entropy")

    def __init__(self, task: "FusionTask"):
        self._task = task
        names = [
            f"{name}{t}" for name in ("accuracy_", *(f"{name}_" for name in _SIMPLE)) for t in range(task.num_tasks)
        ]
        self.metrics = (*self.metrics, *_SIMPLE, "individual", "gain", "worst", *names)

    def prepare(self, params, variables):
        """Returns the parameters of all models, and what functions of the tasks need."""
        base, taus, lam = variables["base"], tuple(variables["taus"]), self._task.settings.lam
        models = {
            "accuracy": self._task.merged(params, variables),
            "base": base,
            "average": apply_task_vectors(base, taus, 1 / len(taus)),
            "task_arithmetic": apply_task_vectors(base, taus, lam),
            "ties": apply_task_vectors(base, [ties_merge(taus)], lam),
        }
        return models, tuple(apply_task_vectors(base, [tau], 1.0) for tau in taus), variables["extra"]

    def collect(self, model, batch, *, key):
        """Returns correct predictions of each model on each task, the entropy of the merged one, and the count."""
        del key
        models, own, extra = model
        mask, functions = batch["mask"], self._task.apply_fns({"extra": extra})
        sums = {"count": jnp.sum(mask)}

        def hits(logits, t):
            return jnp.sum(mask * (jnp.argmax(logits, axis=-1) == batch["labels"][:, t]))

        for name, params in models.items():
            logits = [f(params, batch["inputs"][:, t]) for t, f in enumerate(functions)]
            sums[name] = jnp.stack([hits(x, t) for t, x in enumerate(logits)])
            if name == "accuracy":
                sums["entropy"] = jnp.stack([jnp.sum(mask * prediction_entropy(x)) for x in logits])
        found = [hits(f(own[t], batch["inputs"][:, t]), t) for t, f in enumerate(functions)]
        return {**sums, "individual": jnp.stack(found)}

    def finish(self, eval):
        """Returns means over tasks and, of merged models, the accuracy of each."""
        shares = {name: np.asarray(x) / eval["count"] for name, x in eval.items() if name != "count"}
        found = {name: float(np.mean(x)) for name, x in shares.items()}
        found["entropy"] *= len(shares["entropy"])
        each = {f"{name}_{t}": float(x) for name in ("accuracy", *_SIMPLE) for t, x in enumerate(shares[name])}
        found["worst"] = float(np.min(shares["accuracy"]))
        return {**found, "gain": found["accuracy"] - found["task_arithmetic"], **each}
