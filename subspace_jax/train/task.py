"""What a trainable method has to offer, and how an NNX module becomes one."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from subspace_jax.train.context import gathered
from subspace_jax.train.overrides import form, pair

if TYPE_CHECKING:
    from subspace_jax.train.evaluators import Evaluator

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task:
    """A trainable method: subclass it and override what differs.

    ``params`` is the tree that meets the optimizer.  ``variables`` is whatever else the model carries and returns:
    running statistics, frozen weights, memories; an empty dict where there is nothing.  ``init``, ``loss``,
    ``gradients``, ``after_update`` and ``evaluate`` are pure and traced under the mesh of the run, see
    :func:`subspace_jax.train.constrain`.  Computed arrays belong into ``variables``, not into the object.

    Attributes:
      frozen: Entries of ``variables``, then a dict, that no step changes and no checkpoint holds, such as the weights
        below an adapter.
      ungathered: Entries of ``params`` and ``variables`` that are used as they are sharded, such as embedding tables;
        all others are gathered over the axes that shard examples before the loss.
      splittable: False where the loss needs its whole batch: accumulation is then refused.
    """

    frozen: tuple[str, ...] = ()
    ungathered: tuple[str, ...] = ()
    splittable: bool = True

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Returns fresh ``(params, variables)``, float32; works under ``jax.eval_shape``."""
        raise NotImplementedError(f"{type(self).__name__} has no init(key)")

    def axes(self) -> tuple[PyTree, PyTree]:
        """Returns the logical axis names of ``(params, variables)``: one ``PartitionSpec`` of names for each array.

        By default nothing is sharded.
        """
        return jax.tree.map(lambda x: P(*(None,) * x.ndim), jax.eval_shape(self.init, jax.random.key(0)))

    def roles(self) -> Mapping[str, str]:
        """Returns the role of parameters by path, such as ``{"head/bases": "grassmann"}``.

        Roles are "grassmann" and "stiefel" (moved on the manifold), "no_decay", and "probe" (its gradient is a
        measurement that neither norm nor clipping counts).
        """
        return {}

    def load(self, shardings: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree] | None:
        """Returns ``(params, variables)`` to start from on their shardings, or None for those of :meth:`init`."""
        return None

    def restore_frozen(self, variables: PyTree, shardings: Mapping[str, PyTree]) -> Mapping[str, PyTree]:
        """Returns the entries of ``frozen`` on their shardings, when a run resumes with the other ``variables``."""
        raise NotImplementedError(f"{type(self).__name__}: a task with frozen entries {self.frozen} restores them")

    def loss(
        self, params: PyTree, variables: PyTree, batch: Batch, *, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Returns the mean loss over the batch, and ``(variables, metrics)`` with scalar means as metrics.

        Args:
          params: The parameters.
          variables: The variables.
          batch: Arrays with examples along the first axis.
          key: Random key of this step and micro-batch.
          step: Steps taken in this phase, int32.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss(params, variables, batch, *, key, step)")

    def gradients(
        self,
        params: PyTree,
        variables: PyTree,
        batch: Batch,
        *,
        key: jax.Array,
        step: jax.Array,
        wrt: str | None = None,
    ) -> tuple[tuple[jax.Array, tuple[PyTree, Metrics]], PyTree]:
        """Returns what :meth:`loss` returns, and the gradient: of all parameters, or of the entry ``wrt`` of them.

        Other arguments: see :meth:`loss`.  An override differentiates :func:`subspace_jax.train.gathered` of a
        function, never the function.
        """

        def kept(*args, **kwargs):
            loss, new, metrics = _parts_of_loss(self, self.loss(*args, **kwargs))
            return loss, (without(new, self.frozen), metrics)

        f = gathered(self, kept)
        if wrt is None:
            return jax.value_and_grad(f, has_aux=True)(params, variables, batch, key=key, step=step)

        def of_entry(entry):
            return f({**params, wrt: entry}, variables, batch, key=key, step=step)

        return jax.value_and_grad(of_entry, has_aux=True)(params[wrt])

    def after_update(
        self, params: PyTree, variables: PyTree, *, key: jax.Array, step: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """Returns ``(params, variables)`` after the optimizer's update: retractions, moving averages, counters.

        A moving average of ``params`` is a copy, not the same arrays: a step donates both.
        """
        return params, variables

    def evaluate(self, params: PyTree, variables: PyTree, batch: Batch, *, key: jax.Array) -> Metrics:
        """Returns sums over the examples where ``batch["mask"]`` is 1, and their number under ``"count"``."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} has no evaluate(params, variables, batch, *, key), and no other evaluators")

    def evaluators(self) -> Mapping[str, "Evaluator"]:
        """Returns evaluators by name; by default "eval", the means of :meth:`evaluate` over the set "eval"."""
        from subspace_jax.train.evaluators import TaskEvaluator

        return {"eval": TaskEvaluator(self)}


def _parts_of_loss(task: Task, found: Any) -> tuple[jax.Array, PyTree, Metrics]:
    """Returns loss, variables and metrics; raises a ValueError where :meth:`Task.loss` returned something else."""
    where, expected = f"{type(task).__name__}.loss", "(loss, (variables, metrics))"
    loss, rest = pair(where, found, expected)
    if not isinstance(rest, tuple | list) or len(rest) != 2 or not isinstance(rest[1], Mapping):
        raise ValueError(f"{where}: expected {expected}, got {form(found)}")
    return loss, *rest


def without(variables: PyTree, names: tuple[str, ...]) -> PyTree:
    """Returns a dict without some of its entries."""
    return {name: x for name, x in variables.items() if name not in names} if names else variables


def split_module(make: Callable[[jax.Array], nnx.Module]) -> tuple[nnx.GraphDef, tuple[PyTree, PyTree]]:
    """Splits a module into its static definition and the logical axes of its arrays, without computing any.

    Args:
      make: Builds the module from a key.

    Returns:
      The graph definition, for ``nnx.merge``, and ``(params axes, variables axes)`` as :meth:`Task.axes` gives
      them.  A parameter without ``axes`` metadata is replicated.
    """
    abstract = nnx.eval_shape(make, jax.random.key(0))
    graph, params, variables = nnx.split(abstract, nnx.Param, ...)

    def names(variable: nnx.Variable) -> P:
        return P(*variable.get_metadata().get("axes", ()))

    def tree(state: nnx.State) -> PyTree:
        return nnx.to_pure_dict(jax.tree.map(names, state, is_leaf=lambda v: isinstance(v, nnx.Variable)))

    return graph, (tree(params), tree(variables))


def module_arrays(module: nnx.Module) -> tuple[PyTree, PyTree]:
    """Returns ``(params, variables)`` of a module as nested dicts of arrays."""
    _, params, variables = nnx.split(module, nnx.Param, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(variables)
