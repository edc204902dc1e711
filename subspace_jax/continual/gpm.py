"""Gradient Projection Memory over a stream of tasks (arXiv 2103.09762), as a transform and as phases."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import optim, train
from subspace_jax.continual.certified import CertifiedTask, certified_learner, probe_sets
from subspace_jax.continual.stream import Setup, layer_inputs

PyTree = Any


class ProjectionMemoryState(NamedTuple):
    """State of :func:`projection_memory`.

    Attributes:
      bases: A tree like the parameters of :class:`subspace_jax.optim.GPMBasis`, and ``optax.MaskedNode`` for leaves of
        fewer than two axes.
    """

    bases: PyTree


def projection_memory() -> optax.GradientTransformationExtraArgs:
    """Projects updates of kernels ``[..., d, n]`` out of the subspaces of earlier tasks' inputs.

    Put it last, after Adam too: ``M^T (W - W_start) = 0`` holds for what it returns.  Call :func:`gpm_end_task` between
    two tasks.

    Returns:
      The transform.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax.continual import gpm
      >>> tx = optax.chain(optax.adam(1e-3), gpm.projection_memory())
      >>> state = tx.init({"kernel": jax.numpy.ones((8, 4))})
      >>> inputs = jax.random.normal(jax.random.key(0), (100, 8))
      >>> state = gpm.gpm_end_task(state, {"kernel": inputs.T}, threshold=0.95)
    """

    def init(params):
        def leaf(x):
            if x.ndim < 2:
                return optax.MaskedNode()
            batch, d = x.shape[:-2], x.shape[-2]
            return optim.GPMBasis(jnp.zeros((*batch, d, d), jnp.float32), jnp.zeros(batch, jnp.int32))

        return ProjectionMemoryState(jax.tree.map(leaf, params))

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        structure = jax.tree.structure(updates)
        bases = [None if isinstance(x, optax.MaskedNode) else x for x in structure.flatten_up_to(state.bases)]
        projected, _ = optim.project_out(structure.unflatten(bases)).update(updates, optax.EmptyState())
        return projected, state

    return optax.GradientTransformationExtraArgs(init, update)


def gpm_end_task(state: PyTree, inputs: PyTree, threshold: float) -> PyTree:
    """Ends a task: the main directions of its inputs join the memory, see :func:`subspace_jax.optim.gpm_update`.

    Args:
      state: A :class:`ProjectionMemoryState`, or a tree that holds one, such as the state of ``optax.chain``.
      inputs: The inputs of each layer as columns ``[..., d, samples]``: a tree like the parameters that the memory
        holds kernels of.
      threshold: Share of the squares of the inputs, in (0, 1].

    Returns:
      The state to start the next task with.  It is computed on the host's call, and not under ``jit``.

    Raises:
      ValueError: ``threshold`` is out of range, or inputs don't fit.
      TypeError: There is no such state.
    """
    if not any(map(_is_memory, jax.tree.leaves(state, is_leaf=_is_memory))):
        raise TypeError(f"state: expected a ProjectionMemoryState or a tree that holds one, got {type(state).__name__}")

    def one(columns, basis):
        # The first task counts its directions by another rule.
        return optim.gpm_update(basis if np.max(jax.device_get(basis.dim)) > 0 else None, columns, threshold)

    def of(memory):
        bases = jax.tree.leaves(memory.bases, is_leaf=lambda x: isinstance(x, optim.GPMBasis))
        structure = jax.tree.structure(memory.bases, is_leaf=lambda x: isinstance(x, optim.GPMBasis))
        columns = jax.tree.leaves(inputs)
        if len(columns) != len(bases):
            raise ValueError(f"inputs: expected those of {len(bases)} kernels, got {len(columns)}")
        return ProjectionMemoryState(structure.unflatten([one(x, m) for x, m in zip(columns, bases, strict=True)]))

    return jax.tree.map(lambda x: of(x) if _is_memory(x) else x, state, is_leaf=_is_memory)


def phases(setup: Setup) -> tuple[train.Phase, ...]:
    """Returns a phase for each task; between two of them inputs of every layer join the memory.

    Args:
      setup: ``model.threshold`` is that of :func:`gpm_end_task`.

    Raises:
      ValueError: A field can't serve.
    """
    if not 0 < setup.config.model.threshold <= 1:
        raise ValueError(f"model.threshold: expected a share above 0 and up to 1, got {setup.config.model.threshold}")
    sets = probe_sets(setup)
    parts = [setup.data([t], sets=sets) for t in range(len(setup.stream))]
    kernels = jax.eval_shape(setup.body.init, jax.random.key(0))
    learner = certified_learner(setup, {name: x.shape[0] for name, x in kernels.items()})
    made, found = {}, []
    for t, part in enumerate(parts):
        num_steps = setup.num_steps(part)
        if num_steps not in made:
            made[num_steps] = optax.chain(setup.body_optimizer(num_steps), projection_memory())
        tx = setup.optimizer(num_steps, body=made[num_steps])
        found.append(setup.phase(t, learner, part, tx, _enter(setup, learner, tx, t)))
    return tuple(found)


def _enter(setup: Setup, learner: Any, tx: optax.GradientTransformation, task: int):
    begin, threshold = learner.begin(task), setup.config.model.threshold

    def enter(state, at):
        params, variables, _ = begin(state, at)
        if task == 0:
            return params, variables, None
        inputs = setup.samples(task - 1)["inputs"]
        columns = {
            name: x.reshape(-1, x.shape[-1]).T for name, x in layer_inputs(setup.body, params["body"], inputs).items()
        }
        opt_state = _carried(tx.init(params), gpm_end_task(state.opt_state, columns, threshold))
        if isinstance(learner, CertifiedTask):
            memory = {name: x.basis for name, x in _memory(opt_state).bases.items()}
            variables = learner.ended(params, variables, inputs, task - 1, memory)
        return params, variables, opt_state

    return enter


def _is_memory(x: Any) -> bool:
    return isinstance(x, ProjectionMemoryState)


def _carried(fresh: PyTree, ended: PyTree) -> PyTree:
    """A fresh state with the memory of another one."""
    return jax.tree.map(lambda old, new: old if _is_memory(old) else new, ended, fresh, is_leaf=_is_memory)


def _memory(opt_state: PyTree) -> ProjectionMemoryState:
    (memory,) = (x for x in jax.tree.leaves(opt_state, is_leaf=_is_memory) if _is_memory(x))
    # Of the entry "body" alone, as the optimizer of several entries masks the others.
    return memory._replace(bases=memory.bases["body"])
