"""What a trainable method has to offer, and how an NNX module becomes one."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Task(Protocol):
    """A trainable method as pure functions; every one works under ``jax.jit`` and ``jax.eval_shape``.

    ``params`` is the tree that meets the optimizer.  ``variables`` is whatever else the model carries and returns:
    running statistics, a frozen base; an empty dict where there is nothing.

    A task that starts from a checkpoint has one more method, :func:`subspace_jax.train.init_state` says which.

    A task may have ``frozen``, a tuple of names: entries of ``variables``, then a dict, that no step changes and no
    checkpoint holds, such as the weights below an adapter.  It then also has ``complete(variables, shardings)``, which
    returns a dict of these entries on their shardings (another dict) for the restored ``variables``.
    """

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Returns fresh ``(params, variables)``, float32."""

    def axes(self) -> tuple[PyTree, PyTree]:
        """Returns the logical axis names of ``(params, variables)``: one ``PartitionSpec`` of names for each array."""

    def loss(
        self, params: PyTree, variables: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Returns the mean loss over the batch, and ``(variables, metrics)`` with scalar means as metrics."""

    def evaluate(self, params: PyTree, variables: PyTree, batch: Batch) -> Metrics:
        """Returns sums over the rows where ``batch["mask"]`` is 1, their number under ``"count"``."""


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
