"""CoSO over a stream of tasks (arXiv 2505.11816): the phases of the optimizer :func:`subspace_jax.optim.coso`."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from subspace_jax import optim, train
from subspace_jax.continual.certified import CertifiedTask, certified_learner, probe_sets
from subspace_jax.continual.stream import Setup, StreamTask
from subspace_jax.train.fields import check_at_least

PyTree = Any


def phases(setup: Setup, *, keep_history: bool = True) -> tuple[train.Phase, ...]:
    """Returns a phase for each task; between two of them the sketch of the gradients joins the history.

    Args:
      setup: Its ``optim.name`` is "coso"; ``model.threshold`` and ``model.min_directions`` are those of
        :func:`subspace_jax.optim.coso_end_task`.
      keep_history: Without it every task begins with an empty history, which is what the orthogonality is worth.

    Raises:
      ValueError: The optimizer is another one, or a field can't serve.
    """
    fields = setup.config.model
    if setup.config.optim.name != "coso":
        raise ValueError(f"optim.name: expected 'coso' for model.method, got {setup.config.optim.name!r}")
    if not 0 < fields.threshold <= 1:
        raise ValueError(f"model.threshold: expected a share above 0 and up to 1, got {fields.threshold}")
    check_at_least("model.min_directions", fields.min_directions, 0)
    sets = probe_sets(setup)
    parts = [setup.data([t], sets=sets) for t in range(len(setup.stream))]
    txs = [setup.optimizer(setup.num_steps(part)) for part in parts]
    learner = certified_learner(setup, _history_sizes(setup, txs[0]))
    return tuple(
        setup.phase(t, learner, parts[t], txs[t], _enter(setup, learner, txs[t], t, keep_history))
        for t in range(len(parts))
    )


def histories(opt_state: PyTree, names: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the histories that a state of CoSO holds, by the names of the kernels."""
    (state,) = (x for x in jax.tree.leaves(opt_state, is_leaf=_is_coso) if _is_coso(x))
    return dict(zip(names, jax.tree.leaves(state.history), strict=True))


def ended(opt_state: PyTree, fresh: PyTree, threshold: float, min_directions: int = 0) -> PyTree:
    """Returns an optimizer's state for the next task: CoSO's with its history, all others fresh.

    Args:
      opt_state: The state at the end of a task, such as that of ``optax.partition``.
      fresh: What the optimizer's ``init`` returns.
      threshold: See :func:`subspace_jax.optim.coso_end_task`.
      min_directions: Likewise.

    Raises:
      ValueError: The history is full, or an argument is out of range.
    """
    after = optim.coso_end_task(opt_state, threshold, min_directions)
    return jax.tree.map(lambda old, new: old if _is_coso(old) else new, after, fresh, is_leaf=_is_coso)


def _is_coso(x: Any) -> bool:
    return isinstance(x, optim.CoSOState)


def _history_sizes(setup: Setup, tx: optax.GradientTransformation) -> dict[str, int]:
    params = jax.eval_shape(StreamTask(setup.body, setup.stream.num_classes).init, jax.random.key(0))[0]
    found = histories(jax.eval_shape(tx.init, params), params["body"])
    return {name: x.shape[-1] for name, x in found.items()}


def _enter(setup: Setup, learner: StreamTask, tx: optax.GradientTransformation, task: int, keep_history: bool):
    fields, begin = setup.config.model, learner.begin(task)

    def enter(state, at):
        params, variables, _ = begin(state, at)
        if task == 0:
            return params, variables, None
        opt_state = tx.init(params)
        if keep_history:
            opt_state = ended(state.opt_state, opt_state, fields.threshold, fields.min_directions)
        if isinstance(learner, CertifiedTask):
            inputs = setup.samples(task - 1)["inputs"]
            variables = learner.ended(params, variables, inputs, task - 1, histories(opt_state, params["body"]))
        return params, variables, opt_state

    return enter
