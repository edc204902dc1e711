"""An adapter of low rank for each task on a body that the first task trains."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from subspace_jax import train
from subspace_jax.continual.stream import Body, Setup, StreamTask
from subspace_jax.train.fields import check_at_least


class LoRATask(StreamTask):
    """A learner where a layer is ``h W + h A_t B_t`` for examples of task ``t``, whose position is given.

    Parameters have ``a``, ``{layer: [tasks, d, rank]}``, and ``b``, ``{layer: [tasks, rank, n]}``, which begin at 0.
    Nothing that an earlier task uses moves in a later one, so nothing is forgotten.

    Args:
      body: See :class:`StreamTask`.
      num_classes: Likewise.
      rank: Rank of the adapters.
      temperature: See :class:`StreamTask`.
    """

    def __init__(self, body: Body, num_classes: Sequence[int], *, rank: int, temperature: float = 1.0):
        super().__init__(body, num_classes, temperature=temperature)
        self._rank = rank

    def init(self, key):
        """Returns a learner's start with adapters that change nothing."""
        params, variables = super().init(key)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(params["body"]))
        a, b = {}, {}
        for k, (name, kernel) in zip(keys, params["body"].items(), strict=True):
            d, n = kernel.shape
            a[name] = jax.random.normal(k, (self.num_tasks, d, self._rank), jnp.float32) / jnp.sqrt(jnp.float32(d))
            b[name] = jnp.zeros((self.num_tasks, self._rank, n), jnp.float32)
        return {**params, "a": a, "b": b}, variables

    def axes(self):
        """Returns names by which the body is sharded; adapters are replicated."""
        params, variables = super().axes()
        replicated = {name: P(None, None, None) for name in params["body"]}
        return {**params, "a": replicated, "b": dict(replicated)}, variables

    def features(self, params, variables, inputs, task):
        """Returns features, of each example by its task's adapters."""
        del variables
        one_hot = jax.nn.one_hot(task, self.num_tasks, dtype=jnp.float32)

        def linear(name, x, kernel):
            low = jnp.einsum("b...d,tdr->b...tr", x, params["a"][name])
            low = low * one_hot.reshape(len(one_hot), *(1,) * (low.ndim - 3), self.num_tasks, 1)
            return jnp.matmul(x, kernel) + jnp.einsum("b...tr,trn->b...n", low, params["b"][name])

        return self.body.apply(params["body"], inputs, linear)


def phases(setup: Setup) -> tuple[train.Phase, ...]:
    """Returns a phase for each task: the first trains the body, later ones an adapter of rank ``model.rank``.

    Raises:
      ValueError: The rank is below 1.
    """
    fields = setup.config.model
    check_at_least("model.rank", fields.rank, 1)
    learner = LoRATask(setup.body, setup.stream.num_classes, rank=fields.rank, temperature=fields.temperature)
    still, found = optax.set_to_zero(), []
    for t in range(len(setup.stream)):
        spec = setup.data([t])
        moving = setup.body_optimizer(setup.num_steps(spec))
        entries = {"a": moving, "b": moving, "body": still} if t else {"a": still, "b": still, "body": moving}
        tx = setup.optimizer(setup.num_steps(spec), **entries)
        found.append(setup.phase(t, learner, spec, tx, learner.begin(t)))
    return tuple(found)
