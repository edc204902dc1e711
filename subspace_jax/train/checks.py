"""What is checked of the tasks, evaluators and hooks of a run before it starts, on shapes alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from subspace_jax.train.evaluators import Evaluator
from subspace_jax.train.fields import check_choice
from subspace_jax.train.hook import Hook
from subspace_jax.train.overrides import check_overrides, form, pair
from subspace_jax.train.phases import Phase, Run
from subspace_jax.train.task import Task

PyTree = Any

ROLES = ("grassmann", "stiefel", "no_decay", "probe")


def check_tasks(run: Run) -> None:
    """Raises a ValueError where a method of a task or evaluator takes or returns something else than documented."""
    tasks = {id(phase.task): phase for phase in run.phases if isinstance(phase, Phase)}
    for phase in tasks.values():
        if not isinstance(phase.task, Task):
            raise ValueError(f"task: expected an instance of a Task in phase {phase.name!r}, got {form(phase.task)}")
        check_overrides(Task, phase.task)
        _check_arrays(phase.task)
        _check_evaluators(phase.task)


def check_hooks(hooks: Sequence[Hook]) -> None:
    """Raises a ValueError for what is no sequence of hooks."""
    if not isinstance(hooks, Sequence):
        raise ValueError(f"hooks: expected a sequence of Hook objects, got {form(hooks)}")
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise ValueError(f"hooks: expected instances of Hook, got {form(hook)}")
        check_overrides(Hook, hook)


def _check_arrays(task: Task) -> None:
    """Compares what ``init``, ``axes`` and ``roles`` return."""
    name = type(task).__name__
    arrays = pair(f"{name}.init", jax.eval_shape(task.init, jax.random.key(0)), "(params, variables)")
    axes = pair(f"{name}.axes", task.axes(), "(axes of params, axes of variables)")
    for what, shapes, names in zip(("params", "variables"), arrays, axes, strict=True):
        try:
            jax.tree.structure(shapes).flatten_up_to(names)
        except ValueError:
            expected, got = (sorted(_paths(tree)) for tree in (shapes, names))
            message = f"{name}.axes: expected a PartitionSpec for each array of {what}, {expected}, got {got}"
            raise ValueError(message) from None
    roles = task.roles()
    if not isinstance(roles, Mapping):
        raise ValueError(f"{name}.roles: expected a dict of path to role, got {form(roles)}")
    for path, role in roles.items():
        check_choice(f"{name}.roles[{path!r}]", role, ROLES)


def _check_evaluators(task: Task) -> None:
    evaluators = task.evaluators()
    if not isinstance(evaluators, Mapping):
        name = f"{type(task).__name__}.evaluators"
        raise ValueError(f"{name}: expected a dict of evaluators by name, got {form(evaluators)}")
    for evaluator in evaluators.values():
        if isinstance(evaluator, Evaluator):
            check_overrides(Evaluator, evaluator, {"finish": evaluator.sets or ("result",)})


def _paths(tree: PyTree) -> list[str]:
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple) or x is None)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
