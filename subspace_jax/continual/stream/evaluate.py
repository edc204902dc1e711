"""The accuracy on every task of a stream, and the matrix of accuracies of a run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import train

if TYPE_CHECKING:
    from subspace_jax.continual.stream.learner import StreamTask


class TaskAccuracy(train.Evaluator):
    """Accuracies of all tasks: ``task_T`` given the task of an example, ``any_task_T`` by all heads trained so far.

    ``accuracy`` and ``any_task_accuracy`` are means over the tasks trained so far.

    Args:
      task: The learner.
    """

    metrics = ("accuracy", "any_task_accuracy", "loss")

    def __init__(self, task: "StreamTask"):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns sums over the examples of each task."""
        del key
        scores = train.gathered(self._task, self._task.scores)(*model, batch)
        now, num_tasks = model[1]["task"], self._task.num_tasks
        one_hot = jax.nn.one_hot(batch["task"], num_tasks, dtype=jnp.float32) * batch["mask"][:, None]
        of_task = jnp.einsum("btc,bt->bc", scores, jax.nn.one_hot(batch["task"], num_tasks, dtype=scores.dtype))
        right = jnp.argmax(of_task, axis=-1) == batch["labels"]
        seen = jnp.where((jnp.arange(num_tasks) <= now)[None, :, None], scores, -jnp.inf)
        best = jnp.argmax(seen.reshape(len(scores), -1), axis=-1)
        right_of_all = best == batch["task"] * scores.shape[-1] + batch["labels"]
        picked = jnp.sum(of_task * jax.nn.one_hot(batch["labels"], scores.shape[-1], dtype=scores.dtype), axis=-1)
        losses = jax.nn.logsumexp(of_task, axis=-1) - picked

        def summed(x):
            return jnp.sum(one_hot * x.astype(jnp.float32)[:, None], axis=0)

        sums = {"task": summed(right), "any_task": summed(right_of_all), "loss": summed(losses)}
        return {**sums, "count": jnp.sum(one_hot, axis=0), "now": now.astype(jnp.float32), "batches": jnp.ones(())}

    def finish(self, eval):  # the name of the set
        """Returns means."""
        count, now = np.maximum(eval["count"], 1), round(float(eval["now"] / eval["batches"]))
        values = {name: np.asarray(eval[name]) / count for name in ("task", "any_task", "loss")}
        found = {"accuracy": "task", "any_task_accuracy": "any_task", "loss": "loss"}
        means = {name: float(values[of][: now + 1].mean()) for name, of in found.items()}
        per_task = {f"{of}_{t}": float(x) for of in ("task", "any_task") for t, x in enumerate(values[of])}
        return {**means, **per_task}


def accuracy_matrix(rows: Sequence[Mapping[str, Any]], num_tasks: int, name: str = "task") -> np.ndarray:
    """Returns ``acc[i, j]``, the accuracy on task ``j`` after the last evaluation of the ``i``-th phase evaluated.

    Args:
      rows: Rows of a run.
      num_tasks: Number of tasks.
      name: "task" for accuracies given the task, "any_task" for those by all heads.

    Returns:
      ``[phases, tasks]``, float64.
    """
    last = {row["phase"]: row for row in rows if row["split"] == "eval"}
    return np.asarray([[row[f"{name}_{t}"] for t in range(num_tasks)] for row in last.values()], np.float64)
