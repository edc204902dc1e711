"""Any task, trained inside a random subspace of its parameters."""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P

from subspace_jax import optim
from subspace_jax.optim.random_subspace.subspace import Select
from subspace_jax.train.task import Task


class SubspaceTask(Task):
    """A task whose only parameter is ``theta [dim]``; see :func:`subspace_jax.optim.random_subspace`.

    Parameters at the start and projection are in ``variables["subspace"]``, and in checkpoints.

    Args:
      task: The task; weight penalties in its loss act on all its parameters.
      dim: Dimension of the subspace.
      method: "dense", "sparse", "fastfood" or "said".
      select: Which parameters move; the others stay as they start.
      scope: "global" or "leaf".
      stored: Whether "dense" keeps its matrix.

    Raises:
      ValueError: As :func:`subspace_jax.optim.random_subspace`.
    """

    def __init__(
        self,
        task: Task,
        dim: int,
        method: str = "fastfood",
        *,
        select: Select | None = None,
        scope: str = "global",
        stored: bool = False,
    ):
        self._task, self._dim = task, dim
        self._options = {"method": method, "select": select, "scope": scope, "stored": stored}
        _, variables = jax.eval_shape(self.init, jax.random.key(0))
        self.num_params = variables["subspace"].num_params
        start, rest = task.axes()
        parts = jax.tree.map(lambda x: P(*(None,) * x.ndim), variables["subspace"])
        parts = dataclasses.replace(parts, start=start)
        self._axes = {"theta": P(None)}, {"task": rest, "subspace": parts}
        self.splittable = task.splittable

    def init(self, key):
        """Returns the vector, and parameters, projection and the task's own variables."""
        start_key, key = jax.random.split(key)
        return self._within(key, *self._task.init(start_key))

    def axes(self):
        """Returns the logical axis names: the start has those of the task, the projection is on every device."""
        return self._axes

    def loss(self, params, variables, batch, *, key, step):
        """Returns what the task returns at the parameters that belong to the vector."""
        subspace = variables["subspace"]
        expanded = subspace.expand(params["theta"])
        loss, (rest, metrics) = self._task.loss(expanded, variables["task"], batch, key=key, step=step)
        return loss, ({"task": rest, "subspace": subspace}, metrics)

    def evaluate(self, params, variables, batch, *, key):
        """Returns what the task returns at the parameters that belong to the vector."""
        return self._task.evaluate(variables["subspace"].expand(params["theta"]), variables["task"], batch, key=key)

    def load(self, shardings):
        """Returns the subspace at what the task loads, if anything."""
        start = self._task.load((shardings[1]["subspace"].start, shardings[1]["task"]))
        if start is None:
            return None
        params, rest = start
        make = jax.jit(self._within, out_shardings=shardings)
        return make(jax.random.key(0), params, rest)

    def _within(self, key, params, rest):
        theta, subspace = optim.random_subspace(params, self._dim, key=key, **self._options)
        return {"theta": theta}, {"task": rest, "subspace": subspace}
