"""The two phases of each task of a stream, and the measurements between them."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import train
from subspace_jax.continual.igsp.core import orthogonal_complement_updates
from subspace_jax.continual.igsp.pool import candidate_mask, freeze_pool
from subspace_jax.continual.igsp.state import ContinualState
from subspace_jax.continual.igsp.stream import ExpertStream

PyTree = Any


class Optimizers(NamedTuple):
    """Optax transforms of both phases.

    Attributes:
      experts: Of candidates in the first phase.
      router: Of the router in the first phase.
      kept: Of kept candidates in the second phase.
      kept_router: Of the router in the second phase; None leaves it as it is.
    """

    experts: optax.GradientTransformation
    router: optax.GradientTransformation
    kept: optax.GradientTransformation
    kept_router: optax.GradientTransformation | None


class TaskConfig(NamedTuple):
    """How one task is learnt.

    Attributes:
      identify_steps: The most steps of the first phase.
      tune_steps: Steps of the second phase.
      optimizers: See there.
      project: Whether the second phase keeps candidates out of the historical subspace.
      run: Fields of :class:`subspace_jax.train.Run`, such as ``{"checkpoint_every": 100}``.
    """

    identify_steps: int
    tune_steps: int
    optimizers: Optimizers
    project: bool = True
    run: Mapping[str, Any] = {}


class Usage(train.Evaluator):
    """The routing of a task's training examples, and their frozen features."""

    sets, reduce, last = ("train",), "rows", True

    def __init__(self, task: ExpertStream):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns features and probabilities ``[batch, layers, experts]``; texts of classes count by their mean."""
        params, variables = model
        task, size = self._task, batch["mask"].shape[0]

        def loss(probe):
            kernels = task.kernels(params, variables, probe)
            return task.objective(variables["base"], kernels, variables["task"], batch)[0]

        probs = {}
        for name, p in jax.grad(loss)(task.probe(batch)).items():
            p = (
                p
                if p.shape[1] == size
                else jnp.broadcast_to(jnp.mean(p, axis=1, keepdims=True), (len(p), size, p.shape[2]))
            )
            probs[name] = jnp.swapaxes(p, 0, 1)
        return {"features": task.features(variables["base"], batch), "probs": probs}

    def finish(self, train):
        """Returns the features, and the mean probabilities ``[layers, experts]`` by site."""
        means = {name: p.mean(axis=0) for name, p in train["probs"].items()}
        return {"features": train["features"], "examples": len(train["features"]), **means}


class Experts(train.Evaluator):
    """How many experts there are, and whether the router still moves."""

    sets, metrics = (), ("change",)

    def prepare(self, params, variables):
        """Returns the pools, what is known of the routing, and the task."""
        return variables["past"].pool, variables["routing"], variables["task"]

    def collect(self, model, batch, *, key):
        """Returns counts over all layers."""
        pools, routing, task = model
        own = [pool.owner == task for pool in pools.values()]
        return {
            "experts": sum(jnp.sum(pool.active) for pool in pools.values()),
            "candidates": sum(jnp.sum(candidate_mask(pool) & of) for pool, of in zip(pools.values(), own, strict=True)),
            "calm": routing["calm"],
            "change": routing["change"],
        }

    def finish(self, result):
        """Returns them as scalars."""
        return result


def task_phases(
    task: ExpertStream,
    data: Sequence[train.DataSpec],
    config: TaskConfig,
    *,
    first: int = 0,
    start: ContinualState | None = None,
) -> tuple[train.Phase, ...]:
    """Returns the phases of tasks that follow one another: "identify0", "tune0", "identify1", and so on.

    All tasks share two compiled steps.

    Args:
      task: The model; its evaluators have :class:`Usage` as "usage" and :class:`Experts` as "experts".
      data: The data of each task; their set "train" is the training set, for routing and features.
      config: How a task is learnt.
      first: Number of the first task.
      start: What earlier tasks left; nothing by default.

    Raises:
      ValueError: There are more tasks than there is room for, or a number of steps is below 1.
    """
    if not 1 <= len(data) <= task.num_tasks - first:
        raise ValueError(f"data: expected 1 to {task.num_tasks - first} tasks, got {len(data)}")
    for name in ("identify_steps", "tune_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    identify = identify_optimizer(config.optimizers)
    _, variables = jax.eval_shape(task.init, jax.random.key(0))
    blank = {name: jax.eval_shape(task.basis, pool) for name, pool in variables["past"].pool.items()}
    bases = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), blank)
    tune = tune_optimizer(config.optimizers, bases if config.project else None)

    def begin(state, at, index):
        params, variables = state.params, state.variables
        if index > first:
            variables = {**variables, "past": task.learnt(params, variables)}
        elif start is not None:
            variables = {**variables, "past": start}
        return *task.begun(params, variables, at.key, index), None

    def prune(state, at):
        usage = at.evaluate("usage")
        params, variables = task.pruned(state.params, state.variables, usage, usage["features"])
        if not config.project:
            return params, variables, None
        bases = {name: task.basis(pool) for name, pool in variables["past"].pool.items()}
        return params, variables, tune_optimizer(config.optimizers, bases).init(params)

    settings, phases = task.settings, []
    stop = functools.partial(_has_converged, windows=settings.calm_windows) if settings.tolerance else None
    for i, of_task in enumerate(data, start=first):
        identified = train.Phase(
            f"identify{i}",
            task,
            of_task,
            config.identify_steps,
            identify,
            functools.partial(begin, index=i),
            round_steps=settings.window if stop else 0,
            stop=stop,
        )
        phases += [identified, train.Phase(f"tune{i}", task, of_task, config.tune_steps, tune, prune)]
    return tuple(phases)


def identify_optimizer(optimizers: Optimizers) -> optax.GradientTransformation:
    """Returns the transform of the first phase."""
    return _of_kinds({"a": optimizers.experts, "b": optimizers.experts, "router": optimizers.router})


def tune_optimizer(optimizers: Optimizers, bases: Mapping[str, jax.Array] | None) -> optax.GradientTransformation:
    """Returns the transform of the second phase.

    Args:
      optimizers: See there.
      bases: Historical subspace ``[layers, d_in, q]`` by site; None for updates in all directions.
    """
    of_a = optimizers.kept
    if bases is not None:
        rest = optax.MaskedNode()
        project = orthogonal_complement_updates({"a": dict(bases), "b": rest, "router": rest})
        of_a = optax.chain(project, optimizers.kept, project)
    router = optax.set_to_zero() if optimizers.kept_router is None else optimizers.kept_router
    return _of_kinds({"a": of_a, "b": optimizers.kept, "router": router})


def fit_task(
    task: ExpertStream,
    state: ContinualState | None,
    data: train.DataSpec,
    config: TaskConfig,
    *,
    workdir: str | os.PathLike,
    seed: int = 0,
) -> ContinualState:
    """Learns one task of a stream whose later tasks are not known yet.

    Args:
      task: The model.
      state: What earlier tasks left; None before the first.
      data: The data of the task; its set "train" is the training set.
      config: How it is learnt.
      workdir: Folder of this task's run, which resumes there.
      seed: Seed of candidates and data order.

    Returns:
      The state, its experts frozen.

    Raises:
      ValueError: The pool is full, or there is no room for another task.
    """
    first = 0 if state is None else int(jnp.sum(state.task_stats.count > 0))
    if first >= task.num_tasks:
        raise ValueError(f"state: holds {first} tasks, and there is room for {task.num_tasks}")

    phases = task_phases(task, [data], config, first=first, start=state)
    result = train.fit(train.Run(phases, workdir=workdir, seed=seed, best="", **config.run))
    return learnt_state(task, result.state)


def learnt_state(task: ExpertStream, state: train.TrainState) -> ContinualState:
    """Returns what the tasks so far have learnt, their experts frozen, at the end of a task's second phase."""
    learnt = task.learnt(state.params, state.variables)
    return learnt._replace(pool={name: freeze_pool(pool) for name, pool in learnt.pool.items()})


def _has_converged(rows: Sequence[Mapping[str, Any]], *, windows: int) -> bool:
    measured = [row for row in rows if row["split"] == "experts"]
    return bool(measured) and measured[-1]["calm"] >= windows


def _of_kinds(transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    return optax.partition(dict(transforms), {kind: kind for kind in transforms})
