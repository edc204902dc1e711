"""The train state: what it holds, how it is created and sharded, and which part of it is saved."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax.train.context import jit_on_mesh, use_mesh
from subspace_jax.train.overrides import pair
from subspace_jax.train.phases import Optimizer
from subspace_jax.train.placement import strongly_typed
from subspace_jax.train.sharding import DEFAULT_RULES, Rules, opt_state_shardings, param_shardings
from subspace_jax.train.task import Task, without

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "phase_start", "params", "variables", "opt_state", "key", "skipped"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """What a run needs in order to resume, except for its rows and the position in the data.

    Attributes:
      step: Steps taken in the run, int32; a skipped step counts, for its batch is gone.
      phase_start: The step at which the current phase began, int32.
      params: The tree that meets the optimizer.
      variables: What else the model carries.
      opt_state: State of the optimizer; of several by entry, a dict of their states.
      key: Data of the base random key, uint32; step ``t`` uses the key folded with ``t``.
      skipped: Steps that were skipped because a result was not finite, int32.
    """

    step: jax.Array
    phase_start: jax.Array
    params: PyTree
    variables: PyTree
    opt_state: PyTree
    key: jax.Array
    skipped: jax.Array


def init_optimizer(tx: Optimizer, params: PyTree) -> PyTree:
    """Returns the state of a transform, or of one for each entry that a dict names."""
    if isinstance(tx, Mapping):
        if not tx or not tx.keys() <= params.keys():
            raise ValueError(f"tx: expected entries of the parameters {sorted(params)}, got {sorted(tx)}")
        return {entry: transform.init(params[entry]) for entry, transform in tx.items()}
    return tx.init(params)


def new_state(task: Task, tx: Optimizer, key: jax.Array, start: tuple[PyTree, PyTree] | None = None) -> TrainState:
    """Returns the state before the first step; works under ``jax.jit`` and ``jax.eval_shape``.

    Args:
      task: The method.
      tx: The optimizer, or one for each entry.
      key: Key of all randomness.
      start: Parameters and variables to start from; those of ``task.init`` by default.
    """
    init_key, run_key = jax.random.split(key)
    method, start = ("init", task.init(init_key)) if start is None else ("load", start)
    params, variables = strongly_typed(pair(f"{type(task).__name__}.{method}", start, "(params, variables)"))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, variables, init_optimizer(tx, params), jax.random.key_data(run_key), zero)


def run_key(seed: int) -> jax.Array:
    """Returns the data of the key, uint32, that the state of a run with a seed holds from its start to its end."""
    return jax.random.key_data(jax.random.split(jax.random.key(seed))[1])


def state_shardings(
    task: Task, tx: Optimizer, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> tuple[TrainState, TrainState]:
    """Returns the abstract state and its shardings; nothing is computed.

    Args:
      task: The method.
      tx: The optimizer, or one for each entry.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.

    Returns:
      A state of ``ShapeDtypeStruct`` and one of ``NamedSharding``.
    """
    abstract = jax.eval_shape(functools.partial(new_state, task, tx), jax.random.key(0))
    param_axes, variable_axes = task.axes()
    params = param_shardings(abstract.params, param_axes, mesh, rules)
    if isinstance(tx, Mapping):
        opt_state = {
            entry: opt_state_shardings(transform, abstract.params[entry], params[entry], rules)
            for entry, transform in tx.items()
        }
    else:
        opt_state = opt_state_shardings(tx, abstract.params, params, rules)
    replicated = NamedSharding(mesh, P())
    shardings = TrainState(
        step=replicated,
        phase_start=replicated,
        params=params,
        variables=param_shardings(abstract.variables, variable_axes, mesh, rules),
        opt_state=opt_state,
        key=replicated,
        skipped=replicated,
    )
    return abstract, shardings


def init_state(task: Task, tx: Optimizer, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, seed: int = 0) -> TrainState:
    """Creates the state where it is to live: no device ever holds more than its shards.

    Args:
      task: The method; it starts from what ``task.load`` returns, if anything, and else from ``task.init``.
      tx: The optimizer, or one for each entry.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.
      seed: Seed of the parameters and of all randomness of the steps.  The values do not depend on the mesh.

    Returns:
      The sharded state.
    """
    _, shardings = state_shardings(task, tx, mesh, rules)
    create = functools.partial(new_state, task, tx)
    key = jax.random.key(seed)
    with use_mesh(mesh, rules):
        start = task.load((shardings.params, shardings.variables))
    if start is None:
        return jit_on_mesh(create, mesh, shardings, rules=rules)(key)
    return jit_on_mesh(create, mesh, shardings, rules=rules, donate_argnums=1)(key, start)


def saved_part(task: Task, state: TrainState) -> TrainState:
    """Returns the state without the entries of ``variables`` that no checkpoint holds."""
    return dataclasses.replace(state, variables=without(state.variables, task.frozen))


def complete_state(task: Task, state: TrainState, shardings: TrainState, rules: Rules = DEFAULT_RULES) -> TrainState:
    """Adds to a restored state what no checkpoint holds: the entries of ``variables`` that ``task.frozen`` names.

    Args:
      task: The method.
      state: The saved part of a state.
      shardings: Those of the complete state.
      rules: Logical name to mesh axis or axes.
    """
    if not task.frozen:
        return state
    with use_mesh(shardings.step.mesh, rules):
        held = task.restore_frozen(state.variables, {name: shardings.variables[name] for name in task.frozen})
    return dataclasses.replace(state, variables={**state.variables, **held})
