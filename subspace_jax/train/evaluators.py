"""What is measured of a model between steps: arrays collected on the devices, figures made of them on the host."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax.train.context import gathered, jit_on_mesh
from subspace_jax.train.host import on_first_process
from subspace_jax.train.interruptions import Timed
from subspace_jax.train.overrides import form
from subspace_jax.train.sharding import DEFAULT_RULES, Rules, auto_mesh, batch_sharding, to_device

if TYPE_CHECKING:
    from subspace_jax.train.state import TrainState
    from subspace_jax.train.task import Batch, Task

EVALUATION_KEY = 2**32 - 2  # folded into the key of a run, whose steps are int32
PyTree = Any
Sets = Mapping[str, Callable[[], Iterable[Mapping[str, np.ndarray]]]]


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
        """Returns the task's sums; raises ValueError where they lack their count."""
        sums = gathered(self._task, self._task.evaluate)(*model, batch, key=key)
        if not isinstance(sums, Mapping) or "count" not in sums:
            raise ValueError(f"{type(self._task).__name__}.evaluate: expected sums with 'count', got {form(sums)}")
        return sums

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


class Evaluations:
    """The evaluators of a task, compiled for a mesh at their first pass.

    Args:
      task: The task.
      mesh: The mesh on which states live.
      rules: Logical name to mesh axis or axes.
      data_timeout: Seconds that a set may let the run wait for a batch; 0 waits for ever.
    """

    def __init__(self, task: "Task", mesh: Mesh, rules: Rules = DEFAULT_RULES, *, data_timeout: float = 0.0):
        self.evaluators = dict(task.evaluators())
        self._mesh, self._rules, self._timeout = mesh, rules, data_timeout
        self._compiled: dict[str, tuple[Callable, Callable]] = {}

    def run(self, name: str, state: "TrainState", sets: Sets) -> dict[str, Any]:
        """Returns the scalars, as floats, and arrays of one evaluator.

        Args:
          name: Its name.
          state: The train state.
          sets: Those of :attr:`subspace_jax.train.DataSpec.evaluate`.

        Raises:
          ValueError: A set is not there, or gave no batch.
        """
        evaluator = self.evaluators[name]
        prepare, collect = self.programs(name)
        params, variables, key, step = self._on_auto_axes((state.params, state.variables, state.key, state.step))
        model = prepare(params, variables)
        found = {}
        if not evaluator.sets:
            found["result"] = jax.device_get(collect(model, None, key, step, 0)[0])
        for name_of_set in evaluator.sets:
            if name_of_set not in sets:
                raise ValueError(f"data.evaluate: no set {name_of_set!r} for {name!r}; there are {sorted(sets)}")
            batches = Timed(iter(sets[name_of_set]()), self._timeout, "evaluation data")
            try:
                results = (collect(model, batch, key, step, i) for i, batch in enumerate(self._placed(batches)))
                found[name_of_set] = _REDUCTIONS[evaluator.reduce](results)
            finally:
                batches.close()
            if found[name_of_set] is None:
                raise ValueError(f"data.evaluate: the set {name_of_set!r} gave no batch")

        def finish():
            values = figures(f"finish of {name!r}", evaluator.finish(**found))
            if taken := sorted(_FIELDS_OF_ROWS & values.keys()):
                raise ValueError(f"finish of {name!r}: {taken} name fields of a row; expected other names")
            return values

        return on_first_process(finish)

    def _placed(self, batches):
        place = batch_sharding(auto_mesh(self._mesh), self._rules)
        return (to_device(batch, place) for batch in batches)

    def programs(self, name: str) -> tuple[Callable, Callable]:
        """Returns the jitted ``prepare(params, variables)`` and ``collect(model, batch, key_data, step, index)``."""
        if name not in self._compiled:
            evaluator, mesh = self.evaluators[name], auto_mesh(self._mesh)

            def collect(model, batch, key_data, step, index):
                key = jax.random.fold_in(jax.random.wrap_key_data(key_data), EVALUATION_KEY)
                key = jax.random.fold_in(jax.random.fold_in(key, step), index)
                found = evaluator.collect(model, batch, key=key)
                rows = evaluator.reduce == "rows" and batch is not None
                return found, batch["mask"] if rows else None

            replicated = NamedSharding(mesh, P())
            self._compiled[name] = (
                jit_on_mesh(evaluator.prepare, mesh, None, rules=self._rules),
                jit_on_mesh(collect, mesh, replicated, rules=self._rules),
            )
        return self._compiled[name]

    def _on_auto_axes(self, tree: PyTree) -> PyTree:
        """The same shards as arrays on a mesh with axes of type Auto."""
        if AxisType.Explicit not in self._mesh.axis_types:
            return tree
        mesh = auto_mesh(self._mesh)

        def moved(x):
            shards = [shard.data for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, x.sharding.spec), shards)

        return jax.tree.map(moved, tree)


def _sum(results: Iterable[tuple[PyTree, None]]) -> PyTree | None:
    total = None
    for found, _ in results:
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return jax.device_get(total)


def _rows(results: Iterable[tuple[PyTree, jax.Array]]) -> PyTree | None:
    parts = []
    for found, mask in results:
        kept = jax.device_get(mask) > 0
        found = jax.tree.map(np.asarray, jax.device_get(found))
        shapes = [x.shape for x in jax.tree.leaves(found) if x.shape[:1] != kept.shape]
        if shapes:
            raise ValueError(f"collect: expected arrays with {len(kept)} examples as first axis, got shapes {shapes}")
        parts.append(jax.tree.map(lambda x, kept=kept: x[kept], found))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else None


_REDUCTIONS = {"sum": _sum, "rows": _rows}
_FIELDS_OF_ROWS = {"phase", "split", "step"}  # of the metrics log, beside the values


def evaluate(
    task: "Task", state: "TrainState", sets: Sets, *, mesh: Mesh, rules: Rules = DEFAULT_RULES, name: str = "eval"
) -> dict[str, Any]:
    """Runs one evaluator of a task.

    Args:
      task: The task.
      state: The train state.
      sets: Name to a function that makes one pass over the set, see :class:`subspace_jax.train.DataSpec`.
      mesh: The mesh on which the state lives.
      rules: Logical name to mesh axis or axes.
      name: The evaluator.

    Returns:
      Scalars and arrays by name.

    Raises:
      ValueError: A set is not there or gave no example.
    """
    return Evaluations(task, mesh, rules).run(name, state, sets)


def figures(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what host code measured: scalars as floats, others as arrays.

    Args:
      where: What the message of an error begins with.
      values: Scalars and arrays by name.

    Raises:
      ValueError: ``values`` is no mapping, or holds something else than scalars and arrays of numbers.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a dict of scalars and arrays, got {type(values).__name__}")
    for name, x in values.items():
        if np.asarray(x).dtype.kind in "OSU":
            raise ValueError(f"{where}: expected scalars and arrays of numbers, got {name}={x!r}")
    return {name: float(x) if np.ndim(x) == 0 else np.asarray(x) for name, x in values.items()}


def scalars(name: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the scalars of an evaluator by the names by which ``best`` ranks: those of "eval" have no prefix."""
    prefix = "" if name == "eval" else f"{name}/"
    return {prefix + key: value for key, value in values.items() if np.ndim(value) == 0}
