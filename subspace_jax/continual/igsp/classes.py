"""Streams of classification: scores by the task's router, or by the router that an example seems to belong to."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import metrics, train
from subspace_jax.continual.igsp.model import ExpertKernel
from subspace_jax.continual.igsp.phases import Experts, Usage
from subspace_jax.continual.igsp.stats import nearest_task
from subspace_jax.continual.igsp.stream import ExpertStream

PyTree = Any


class ClassStream(ExpertStream):
    """A stream of classification tasks, the classes of each given by vectors that images are compared with.

    Batches hold ``inputs``, ``labels`` (within the task) and ``task``.  Subclasses give :meth:`class_vectors` and
    :meth:`embed`.

    Args:
      num_classes: Classes of each task.
      label_smoothing: Of the cross-entropy.
      **others: Arguments of :class:`ExpertStream` but the number of tasks.
    """

    def __init__(self, num_classes: Sequence[int], label_smoothing: float = 0.0, **others: Any):
        super().__init__(num_tasks=len(num_classes), **others)
        self.num_classes, self._smoothing = np.asarray(num_classes), label_smoothing

    def class_vectors(self, base: PyTree, kernels: Mapping[str, ExpertKernel], task: jax.Array) -> jax.Array:
        """Returns the vectors of a task's classes ``[classes, d]``, those beyond its classes arbitrary."""
        raise NotImplementedError

    def embed(self, base: PyTree, kernels: Mapping[str, ExpertKernel], inputs: jax.Array) -> jax.Array:
        """Returns the vectors of inputs ``[batch, d]``."""
        raise NotImplementedError

    def logits(self, base: PyTree, vectors: jax.Array, classes: jax.Array) -> jax.Array:
        """Returns the logits of vectors ``[batch, d]`` for classes ``[batch or 1, classes, d]``."""
        raise NotImplementedError

    def objective(self, base, kernels, task, batch):
        """Returns the cross-entropy over the task's classes, and the accuracy."""
        classes = self.class_vectors(base, kernels, task)
        logits = self.logits(base, self.embed(base, kernels, batch["inputs"]), classes[None])
        logits = jnp.where(self._valid(task)[None], logits, -jnp.inf)
        own = jax.nn.one_hot(batch["labels"], logits.shape[1], dtype=logits.dtype)
        count = jnp.sum(self._valid(task)).astype(logits.dtype)
        even = self._valid(task).astype(logits.dtype) / count
        targets = (1 - self._smoothing) * own + self._smoothing * even[None]
        log_probs = jnp.where(self._valid(task)[None], jax.nn.log_softmax(logits), 0)
        right = jnp.mean((jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32))
        return -jnp.mean(jnp.sum(targets * log_probs, axis=-1)), {"accuracy": right}

    def _valid(self, task):
        """Which classes a task has, ``[..., classes]`` bool."""
        counts = jnp.asarray(self.num_classes, jnp.int32)[task][..., None]
        shape = (*counts.shape[:-1], int(self.num_classes.max()))
        return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < counts

    def evaluators(self):
        """Returns the routing, the number of experts, and the accuracies of all tasks."""
        return {"usage": Usage(self), "experts": Experts(), "eval": Accuracies(self)}


class Accuracies(train.Evaluator):
    """Accuracies over the classes of each task: ``task_T`` given the task, ``routed_task_T`` by the nearest task.

    A task that has not come, and an example that is near no task, are served by the frozen model.  ``accuracy`` and
    ``routed_accuracy`` are means over the tasks so far.
    """

    metrics, last = ("accuracy", "routed_accuracy"), True

    def __init__(self, task: ClassStream):
        self._task = task

    def prepare(self, params, variables):
        """Returns the state with the current task, and the class vectors ``[tasks + 1, tasks, classes, d]``.

        The first axis is the router by which texts go; the last entry is the frozen model.
        """
        task, base = self._task, variables["base"]
        state, size = task.learnt(params, variables), task.num_tasks

        def of_router(router):
            def of_task(j):
                kernels = task.stream_kernels(base, state, jnp.full(task.class_rows, router, jnp.int32))
                return task.class_vectors(base, kernels, j)

            return jax.lax.map(of_task, jnp.arange(size, dtype=jnp.int32))

        routers = jnp.concatenate([jnp.arange(size, dtype=jnp.int32), jnp.full(1, -1, jnp.int32)])
        return base, state, jax.lax.map(of_router, routers), variables["task"]

    def collect(self, model, batch, *, key):
        """Returns sums over the examples of each task."""
        base, state, vectors, now = model
        task, of = self._task, batch["task"]
        found = {"count": jnp.ones_like(batch["mask"])}
        routes = {
            "task": jnp.where(of <= now, of, -1),
            "routed_task": nearest_task(state.task_stats, task.features(base, batch)).task,
        }
        for name, route in routes.items():
            kernels = task.stream_kernels(base, state, route)
            classes = vectors[jnp.where(route < 0, task.num_tasks, route), of]
            logits = task.logits(base, task.embed(base, kernels, batch["inputs"]), classes)
            best = jnp.argmax(jnp.where(task._valid(of), logits, -jnp.inf), axis=-1)
            found[name] = (best == batch["labels"]).astype(jnp.float32)
        found["found"] = (routes["routed_task"] == routes["task"]).astype(jnp.float32)
        own = jax.nn.one_hot(of, task.num_tasks) * batch["mask"][:, None]
        sums = {name: jnp.sum(own * x[:, None], axis=0) for name, x in found.items()}
        return {**sums, "now": now.astype(jnp.float32), "batches": jnp.ones(())}

    def finish(self, eval):  # the name of the set
        """Returns means: of each task, and over those so far."""
        now = round(float(eval["now"] / eval["batches"])) + 1
        each = {
            name: np.asarray(eval[name]) / np.maximum(eval["count"], 1) for name in ("task", "routed_task", "found")
        }
        means = {"accuracy": "task", "routed_accuracy": "routed_task", "right_router": "found"}
        per_task = {f"{of}_{t}": float(x) for of in ("task", "routed_task") for t, x in enumerate(each[of])}
        return {**{name: float(each[of][:now].mean()) for name, of in means.items()}, **per_task}


def class_summary(rows: Sequence[Mapping[str, Any]], num_tasks: int) -> dict[str, float]:
    """Returns the scores of MTIL by the nearest task's router, forgetting given the task, and the experts added."""
    tuned = [row for row in rows if row["phase"].startswith("tune")]
    measured = [row for row in tuned if row["split"] == "eval"]
    given, routed = (
        np.asarray([[row[f"{name}_{t}"] for t in range(num_tasks)] for row in measured])
        for name in ("task", "routed_task")
    )
    scores = metrics.mtil_metrics(routed)
    added = [int(row["candidates"]) for row in tuned if row["split"] == "experts"]
    return {
        **{name: scores[name] for name in ("transfer", "avg", "last")},
        "forgetting": metrics.forgetting(given),
        "final_accuracy": metrics.final_accuracy(given),
        **{f"added{t}": n for t, n in enumerate(added)},
    }
