"""Elastic weight consolidation over a stream of tasks (Kirkpatrick et al., arXiv 1612.00796)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax import train
from subspace_jax.continual.stream import Body, Setup, StreamTask
from subspace_jax.continual.stream.learner import own_scores
from subspace_jax.train.fields import check_at_least

PyTree = Any


class EWCTask(StreamTask):
    """A learner with a quadratic penalty on moves of the body away from what earlier tasks need.

    The sum of all earlier tasks' penalties ``strength / 2 * sum F (w - w_t)^2`` is one of the same form, up to a
    constant: ``variables`` has the sum of their Fisher diagonals and the mean of their kernels, weighted by these.

    Args:
      body: See :class:`StreamTask`.
      num_classes: Likewise.
      strength: Of the penalty.
      temperature: See :class:`StreamTask`.
    """

    def __init__(self, body: Body, num_classes: Sequence[int], *, strength: float, temperature: float = 1.0):
        super().__init__(body, num_classes, temperature=temperature)
        self._strength = strength
        self._fisher = jax.jit(self._diagonal)

    def init(self, key):
        """Returns a learner's start with importances of 0."""
        params, variables = super().init(key)
        zeros = jax.tree.map(jnp.zeros_like, params["body"])
        return params, {**variables, "fisher": zeros, "anchor": jax.tree.map(jnp.zeros_like, zeros)}

    def penalty(self, params, variables):
        """Returns the penalty."""
        terms = jax.tree.map(
            lambda f, w, a: jnp.sum(f * jnp.square(w - a)), variables["fisher"], params["body"], variables["anchor"]
        )
        return self._strength / 2 * jax.tree.reduce(jnp.add, terms, jnp.zeros((), jnp.float32))

    def ended(self, params: PyTree, variables: PyTree, batch: dict[str, Any], key: jax.Array) -> PyTree:
        """Returns the variables after the end of a task, with its Fisher diagonal.

        Args:
          params: The parameters.
          variables: The variables.
          batch: Examples of the task: ``inputs`` and ``task``.
          key: Draws labels from the predictions.
        """
        given = {name: batch[name] for name in ("inputs", "task")}
        found, old = self._fisher(params, variables, given, key), variables["fisher"]
        total = jax.tree.map(jnp.add, old, found)

        def mean(f, a, new, w, t):
            return jnp.where(t > 0, (f * a + new * w) / jnp.where(t > 0, t, 1), w)

        anchor = jax.tree.map(mean, old, variables["anchor"], found, params["body"], total)
        return {**variables, "fisher": total, "anchor": anchor}

    def _diagonal(self, params, variables, batch, key):
        """Mean squares of each example's gradient of the log-likelihood of a label drawn from its prediction."""

        def scores(body, example):
            whole = jax.tree.map(lambda x: x[None], example)
            return own_scores(self.scores({**params, "body": body}, variables, whole), whole["task"])[0]

        def of_example(sums, pair):
            example, key = pair

            def log_likelihood(body):
                own = scores(body, example)
                label = jax.random.categorical(key, jax.lax.stop_gradient(own))
                return jax.nn.log_softmax(own)[label]

            grads = jax.grad(log_likelihood)(params["body"])
            return jax.tree.map(lambda s, g: s + jnp.square(g), sums, grads), None

        count = len(batch["task"])
        zeros = jax.tree.map(jnp.zeros_like, params["body"])
        sums, _ = jax.lax.scan(of_example, zeros, (batch, jax.random.split(key, count)))
        return jax.tree.map(lambda s: s / count, sums)


def phases(setup: Setup) -> tuple[train.Phase, ...]:
    """Returns a phase for each task, with penalties by ``model.strength`` for all earlier ones.

    Raises:
      ValueError: The strength is negative.
    """
    fields = setup.config.model
    check_at_least("model.strength", fields.strength, 0)
    learner = EWCTask(setup.body, setup.stream.num_classes, strength=fields.strength, temperature=fields.temperature)
    found = []
    for t in range(len(setup.stream)):
        spec = setup.data([t])
        tx = setup.optimizer(setup.num_steps(spec))
        found.append(setup.phase(t, learner, spec, tx, _enter(setup, learner, t)))
    return tuple(found)


def _enter(setup: Setup, learner: EWCTask, task: int):
    begin = learner.begin(task)

    def enter(state, at):
        params, variables, _ = begin(state, at)
        if task:
            variables = learner.ended(params, variables, setup.samples(task - 1), at.key)
        return params, variables, None

    return enter
