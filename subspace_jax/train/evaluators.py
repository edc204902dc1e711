"""What is measured of a model between steps: arrays collected on the devices, figures made of them on the host."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from subspace_jax.train.context import gathered

if TYPE_CHECKING:
    from subspace_jax.train.task import Batch, Task

PyTree = Any


class Evaluator:
    """A measurement over one or more sets of examples: subclass it and override what differs.

    A pass calls ``prepare`` once, ``collect`` for every batch of every set, and ``finish`` once.  The first two are
    jitted, and traced under the mesh of the run.  ``finish`` runs on process 0 with NumPy arrays.

    Attributes:
      sets: Names of the sets of :attr:`subspace_jax.train.DataSpec.evaluate`.  With none, ``collect`` is called once
        with ``batch`` None, and its result reaches ``finish`` under the name ``result``.
      reduce: How what batches give becomes one tree for each set.  "sum" adds it up; "rows" concatenates it along the
        first axis, without the padding (where ``batch["mask"]`` is 0), batch by batch on the host.
      metrics: Names of the scalars by which ``best`` may rank.
      last: Whether it runs at the end of a phase only.
    """

    sets: tuple[str, ...] = ("eval",)
    reduce: str = "sum"
    metrics: tuple[str, ...] = ()
    last: bool = False

    def prepare(self, params: PyTree, variables: PyTree) -> PyTree:
        """Returns what ``collect`` needs of the model; ``(params, variables)`` by default, as they are sharded."""
        return params, variables

    def collect(self, model: PyTree, batch: "Batch | None", *, key: jax.Array) -> PyTree:
        """Returns the arrays of one batch."""
        raise NotImplementedError

    def finish(self, **collected: PyTree) -> Mapping[str, Any]:
        """Returns scalars and arrays by name from what each set gave; scalars are logged."""
        raise NotImplementedError

    def scalar_names(self, collected: PyTree) -> tuple[str, ...]:
        """Returns the names by which ``best`` may rank, from the shapes of what ``collect`` returns."""
        return self.metrics


class TaskEvaluator(Evaluator):
    """The means of :meth:`subspace_jax.train.Task.evaluate` over a set.

    Args:
      task: The task.
      name: The set.
    """

    def __init__(self, task: "Task", name: str = "eval"):
        self._task, self.sets = task, (name,)

    def collect(self, model, batch, *, key):
        """Returns the task's sums."""
        return gathered(self._task, self._task.evaluate)(*model, batch, key=key)

    def finish(self, **collected):
        """Divides the sums by their count; raises ValueError where there is no example."""
        ((name, sums),) = collected.items()
        count = float(sums["count"])
        if not count:
            raise ValueError(f"evaluate: the set {name!r} gave no example")
        return {key: float(value) / count for key, value in sums.items() if key != "count"}

    def scalar_names(self, collected):
        """Returns the names of the sums."""
        return tuple(sorted(collected.keys() - {"count"}))
