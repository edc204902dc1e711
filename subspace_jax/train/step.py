"""The train state and the one train step."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax.adapters.gradient_probes import PROBES
from subspace_jax.train.sharding import (
    DEFAULT_RULES,
    Rules,
    auto_mesh,
    batch_sharding,
    follow_params,
    gather,
    jit_on_mesh,
    param_shardings,
)
from subspace_jax.train.task import Batch, Metrics, Task

PyTree = Any

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "variables", "opt_state", "key", "skipped"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """Everything that a run needs in order to go on, but for the position in the data.

    Attributes:
      step: Steps taken, int32; a skipped step counts, for its batch is gone.
      params: The tree that meets the optimizer.
      variables: What else the model carries.
      opt_state: State of the Optax transform.
      key: Data of the base random key, uint32; step ``t`` uses the key folded with ``t``.
      skipped: Steps that were skipped because a result was not finite, int32.
    """

    step: jax.Array
    params: PyTree
    variables: PyTree
    opt_state: PyTree
    key: jax.Array
    skipped: jax.Array


def new_state(
    task: Task, tx: optax.GradientTransformation, key: jax.Array, start: tuple[PyTree, PyTree] | None = None
) -> TrainState:
    """Returns the state before the first step; works under ``jax.jit`` and ``jax.eval_shape``.

    Args:
      task: The method.
      tx: The optimizer.
      key: Key of all randomness.
      start: Parameters and variables to start from; those of ``task.init`` by default.
    """
    init_key, run_key = jax.random.split(key)
    params, variables = task.init(init_key) if start is None else start
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, variables, tx.init(params), jax.random.key_data(run_key), zero)


def run_key(seed: int) -> jax.Array:
    """Returns the data of the key, uint32, that the state of a run with a seed holds from its start to its end."""
    return jax.random.key_data(jax.random.split(jax.random.key(seed))[1])


def state_shardings(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> tuple[TrainState, TrainState]:
    """Returns the abstract state and its shardings; nothing is computed.

    Args:
      task: The method.
      tx: The optimizer.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.

    Returns:
      A state of ``ShapeDtypeStruct`` and one of ``NamedSharding``.
    """
    abstract = jax.eval_shape(functools.partial(new_state, task, tx), jax.random.key(0))
    param_axes, variable_axes = task.axes()
    params = param_shardings(abstract.params, param_axes, mesh, rules)
    whole = NamedSharding(mesh, P())
    shardings = TrainState(
        step=whole,
        params=params,
        variables=param_shardings(abstract.variables, variable_axes, mesh, rules),
        opt_state=follow_params(abstract.opt_state, abstract.params, params, rules),
        key=whole,
        skipped=whole,
    )
    return abstract, shardings


def init_state(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, seed: int = 0
) -> TrainState:
    """Creates the state where it is to live: no device ever holds more than its share.

    A task may have a method ``load(shardings)``, which reads ``(params, variables)`` straight onto their shardings,
    from a checkpoint of another run or library: they are then used instead of those of ``init``.

    Args:
      task: The method.
      tx: The optimizer.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.
      seed: Seed of the parameters and of all randomness of the steps.  The values do not depend on the mesh.

    Returns:
      The sharded state.
    """
    _, shardings = state_shardings(task, tx, mesh, rules)
    create = functools.partial(new_state, task, tx)
    key = jax.random.key(seed)
    if not hasattr(task, "load"):
        return jit_on_mesh(create, mesh, shardings)(key)
    start = task.load((shardings.params, shardings.variables))
    return jit_on_mesh(create, mesh, shardings, donate_argnums=1)(key, start)


def complete_state(task: Task, state: TrainState, shardings: TrainState) -> TrainState:
    """Adds to a restored state what no checkpoint holds: the entries of ``variables`` that ``task.frozen`` names.

    Args:
      task: The method.
      state: From :meth:`subspace_jax.train.Checkpoints.restore`.
      shardings: Of the whole state.
    """
    names = frozen_names(task)
    if not names:
        return state
    held = task.complete(state.variables, {name: shardings.variables[name] for name in names})
    return dataclasses.replace(state, variables={**state.variables, **held})


def frozen_names(task: Task) -> tuple[str, ...]:
    """Returns the entries of ``variables`` that no step changes and no checkpoint holds."""
    return tuple(getattr(task, "frozen", ()))


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
    *,
    accumulate: int = 1,
    remat: str = "none",
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compiles one step: loss, gradient, optimizer, with the state donated and sharded by the rules.

    A step is skipped where the loss or the norm of the gradient is not finite, or where an entry of parameters,
    variables or optimizer state that was finite would no longer be: all three stay as they were, and ``state.skipped``
    counts the step.  (Entries that a state holds as infinite from the start, such as a best value, are let be.)  The
    check reads each array of the state once and reduces it to one flag, which nothing on the host waits for: 2 % of the
    memory traffic of a step of Llama 3 8B with AdamW on 16 chips, and no more memory.

    Args:
      task: The method.
      tx: The optimizer; it is given the loss as the extra argument ``value``, and the shardings of the parameters as
        ``shardings``.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.
      accumulate: Micro-batches that a batch is cut into; their gradients are averaged, so that activations need
        memory for one of them only.
      remat: What is kept for the backward pass: "none" keeps everything that the compiler wants, "dots" the matrix
        products of weights, "full" nothing but the arguments.

    Returns:
      ``step(state, batch) -> (state, metrics)``.  The metrics are scalars: ``loss``, ``grad_norm``, ``skipped``, and
      those of the task.  ``grad_norm`` leaves out what energy probes deliver, which is no gradient; see
      :func:`subspace_jax.adapters.add_energy_probes`.

    Raises:
      ValueError: ``accumulate`` is below 1, or ``remat`` is unknown.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 micro-batch, got {accumulate}")
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat: expected one of {sorted(REMAT_POLICIES)}, got {remat!r}")
    _, shardings = state_shardings(task, tx, mesh, rules)
    # The body of the step sees Auto axes, on any mesh.
    inside = jax.tree.map(lambda x: NamedSharding(auto_mesh(mesh), x.spec), shardings.params)
    frozen = frozen_names(task)

    def loss_fn(params, variables, held, batch, key):
        variables = {**variables, **held} if frozen else variables
        params, variables = gather((params, variables), task.axes(), mesh, rules)
        loss, (variables, metrics) = task.loss(params, variables, batch, key)
        return loss, (_without(variables, frozen), metrics)

    if remat != "none":
        loss_fn = jax.checkpoint(loss_fn, policy=REMAT_POLICIES[remat])
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    tx = optax.with_extra_args_support(tx)
    rows = batch_sharding(mesh, rules)

    def gradients(state: TrainState, held: PyTree, batch: Batch, key: jax.Array):
        if accumulate == 1:
            (loss, (variables, metrics)), grads = gradient(state.params, state.variables, held, batch, key)
            return variables, grads, {"loss": loss, **metrics}

        def split(x):
            # Every micro-batch takes rows from every device, so that cutting the batch moves no data.
            parts = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(parts, NamedSharding(auto_mesh(mesh), P(None, *rows.spec)))

        def one(variables, part, part_key):
            (loss, (variables, metrics)), grads = gradient(state.params, variables, held, part, part_key)
            return variables, (grads, {"loss": loss, **metrics})

        def add(carry, inputs):
            variables, sums = carry
            variables, results = one(variables, *inputs)
            return (variables, jax.tree.map(jnp.add, sums, results)), None

        parts, keys = jax.tree.map(split, batch), jax.random.split(key, accumulate)
        _, results = jax.eval_shape(one, state.variables, *jax.tree.map(lambda x: x[0], (parts, keys)))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
        (variables, sums), _ = jax.lax.scan(add, (state.variables, zeros), (parts, keys))
        grads, metrics = jax.tree.map(lambda x: x / accumulate, sums)
        return variables, grads, metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # What is frozen goes around all that a step does, so that its buffers are handed on as they are.
        held = {name: state.variables[name] for name in frozen}
        state = dataclasses.replace(state, variables=_without(state.variables, frozen))
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        variables, grads, metrics = gradients(state, held, batch, key)
        grad_norm = _gradient_norm(grads)
        given = {"value": metrics["loss"], "shardings": inside}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **given)
        new = (optax.apply_updates(state.params, updates), variables, opt_state)
        old = (state.params, state.variables, state.opt_state)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & _stays_finite(old, new)
        # Not by `cond`: the compiler would keep the old arrays, or compute the new ones twice.
        params, variables, opt_state = jax.tree.map(functools.partial(jax.lax.select, finite), new, old)
        variables = {**variables, **held} if frozen else variables
        skipped = state.skipped + jnp.where(finite, 0, 1)
        new = TrainState(state.step + 1, params, variables, opt_state, state.key, skipped)
        return new, {**metrics, "grad_norm": grad_norm, "skipped": skipped}

    results = (shardings, NamedSharding(mesh, P()))
    return jit_on_mesh(step, mesh, results, in_shardings=(shardings, rows), donate_argnums=0)


def _gradient_norm(grads: PyTree) -> jax.Array:
    flat = jax.tree_util.tree_leaves_with_path(grads)
    return optax.tree.norm([g for path, g in flat if not path or getattr(path[-1], "key", None) not in PROBES])


def _stays_finite(old: PyTree, new: PyTree) -> jax.Array:
    """Whether every entry that was finite still is."""

    def spoilt(x, y):
        return jnp.any(jnp.isfinite(x) & ~jnp.isfinite(y))

    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    found = [spoilt(x, y) for x, y in pairs if jnp.issubdtype(y.dtype, jnp.inexact)]
    return ~functools.reduce(jnp.logical_or, found, jnp.asarray(False))


def _without(variables: PyTree, names: tuple[str, ...]) -> PyTree:
    return {name: x for name, x in variables.items() if name not in names} if names else variables


def make_eval_step(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> Callable[[TrainState, Batch], Metrics]:
    """Compiles the evaluation of one batch.

    Args:
      task: The method.
      tx: The optimizer, for the shardings of the state.
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.

    Returns:
      ``evaluate(state, batch) -> sums``, as :meth:`Task.evaluate` gives them, replicated.
    """
    _, shardings = state_shardings(task, tx, mesh, rules)

    def evaluate(state, batch):
        params, variables = gather((state.params, state.variables), task.axes(), mesh, rules)
        return task.evaluate(params, variables, batch)

    rows = batch_sharding(mesh, rules)
    return jit_on_mesh(evaluate, mesh, NamedSharding(mesh, P()), in_shardings=(shardings, rows))
