"""Frozen features and the nearest class mean: a floor that forgets nothing."""

import jax
import jax.numpy as jnp
import optax

from subspace_jax import train
from subspace_jax.continual.stream import Setup, StreamTask

_EXACT = jax.lax.Precision.HIGHEST  # sums over all examples, and differences of scores that nearly cancel


class ClassMeansTask(StreamTask):
    """A learner that trains nothing: it adds up the features of each class.

    ``variables`` has ``sums [tasks, classes, features]`` and ``counts [tasks, classes]``.  Scores order classes by the
    distance of their means.
    """

    def init(self, key):
        """Returns a learner's start with empty sums."""
        params, variables = super().init(key)
        shape = (self.num_tasks, max(self.num_classes))
        sums = jnp.zeros((*shape, self.body.features), jnp.float32)
        return params, {**variables, "sums": sums, "counts": jnp.zeros(shape, jnp.float32)}

    def head_scores(self, params, variables, features):
        """Returns ``2 f m - |m|^2`` for the means, and a very low score for classes without an example."""
        del params
        counts = variables["counts"]
        means = variables["sums"] / jnp.maximum(counts, 1)[..., None]
        scores = (
            2 * jnp.einsum("bd,tcd->btc", features, means, precision=_EXACT) - jnp.sum(jnp.square(means), axis=-1)[None]
        )
        return jnp.where((counts > 0)[None], scores, -1e20)

    def loss(self, params, variables, batch, *, key, step):
        """Returns a loss of 0, and the variables with the features of the batch."""
        del key, step
        features = jax.lax.stop_gradient(self.features(params, variables, batch["inputs"], batch["task"]))
        tasks = jax.nn.one_hot(batch["task"], self.num_tasks, dtype=jnp.float32)
        classes = jax.nn.one_hot(batch["labels"], max(self.num_classes), dtype=jnp.float32)
        sums = variables["sums"] + jnp.einsum("bt,bc,bd->tcd", tasks, classes, features, precision=_EXACT)
        counts = variables["counts"] + jnp.einsum("bt,bc->tc", tasks, classes)
        return jnp.zeros((), jnp.float32), ({**variables, "sums": sums, "counts": counts}, {})


def phases(setup: Setup) -> tuple[train.Phase, ...]:
    """Returns a phase for each task: one pass over its examples, in full batches."""
    learner, still, found = ClassMeansTask(setup.body, setup.stream.num_classes), optax.set_to_zero(), []
    for t in range(len(setup.stream)):
        spec = setup.data([t])
        phase = setup.phase(t, learner, spec, still, learner.begin(t))
        found.append(phase._replace(num_steps=spec.steps_per_epoch))
    return tuple(found)
