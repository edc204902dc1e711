"""A network with a head for each task of a stream, as a task of the train loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from subspace_jax import train
from subspace_jax.continual.stream.body import Body, plain
from subspace_jax.continual.stream.evaluate import TaskAccuracy

PyTree = Any
Begin = Callable[["train.TrainState", "train.At"], tuple[PyTree, PyTree, PyTree]]

_NO_CLASS = -1e30  # score of a class that a task does not have


class StreamTask(train.Task):
    """Cross-entropy of a batch's examples over the classes of their own tasks.

    Batches hold ``inputs``, ``labels`` and ``task``, the position of an example's task, as
    :func:`subspace_jax.continual.stream.task_data` makes them.  One object serves all tasks of a stream, so that a new
    task compiles nothing: parameters are ``body`` and ``heads``, of all tasks, and heads of tasks that no example of a
    batch belongs to have no gradient.  ``variables["task"]`` is the position of the task that is trained.

    Args:
      body: The network below the heads.
      num_classes: Classes of each task.
      temperature: Divides the scores in the loss.
    """

    def __init__(self, body: Body, num_classes: Sequence[int], *, temperature: float = 1.0):
        self.body, self.num_classes, self.temperature = body, tuple(num_classes), temperature

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.num_classes)

    def init(self, key):
        """Returns kernels by He's rule, normal heads, and task 0."""
        keys, d = jax.random.split(key), self.body.features
        heads = jax.random.normal(keys[1], (self.num_tasks, d, max(self.num_classes)), jnp.float32) / jnp.sqrt(
            jnp.float32(d)
        )
        return {"body": self.body.init(keys[0]), "heads": heads}, {"task": jnp.zeros((), jnp.int32)}

    def axes(self):
        """Returns names by which kernels of the body are sharded; all else is replicated."""
        params, variables = (
            jax.tree.map(lambda x: P(*(None,) * x.ndim), tree) for tree in jax.eval_shape(self.init, jax.random.key(0))
        )
        names = [P("embed", "mlp"), P("mlp", "embed")]
        return {**params, "body": {name: names[i % 2] for i, name in enumerate(params["body"])}}, variables

    def features(self, params: PyTree, variables: PyTree, inputs: jax.Array, task: jax.Array) -> jax.Array:
        """Returns the features ``[batch, features]`` of examples of these tasks ``[batch]``."""
        del variables, task
        return self.body.apply(params["body"], inputs, plain)

    def head_scores(self, params: PyTree, variables: PyTree, features: jax.Array) -> jax.Array:
        """Returns scores by all heads, ``[batch, tasks, classes]``."""
        del variables
        return jnp.einsum("bd,tdc->btc", features, params["heads"])

    def scores(self, params: PyTree, variables: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns scores by all heads, ``[batch, tasks, classes]``; very low ones for classes that a task lacks."""
        features = self.features(params, variables, batch["inputs"], batch["task"])
        there = jnp.arange(max(self.num_classes))[None] < jnp.asarray(self.num_classes)[:, None]
        return jnp.where(there[None], self.head_scores(params, variables, features), _NO_CLASS)

    def penalty(self, params: PyTree, variables: PyTree) -> jax.Array:
        """Returns what is added to the loss."""
        del params, variables
        return jnp.zeros((), jnp.float32)

    def loss(self, params, variables, batch, *, key, step):
        """Returns the mean cross-entropy, and the accuracy as a metric."""
        del key, step
        own = own_scores(self.scores(params, variables, batch), batch["task"])
        losses = optax.softmax_cross_entropy_with_integer_labels(own / self.temperature, batch["labels"])
        right = (jnp.argmax(own, axis=-1) == batch["labels"]).astype(jnp.float32)
        return jnp.mean(losses) + self.penalty(params, variables), (variables, {"accuracy": jnp.mean(right)})

    def evaluators(self):
        """Returns "eval": the accuracy of every task, given its position and not given it."""
        return {"eval": TaskAccuracy(self)}

    def begin(self, task: int) -> Begin:
        """Returns the ``enter`` of a phase that trains a task: all is handed on, and the optimizer starts fresh."""

        def enter(state, at):
            del at
            return state.params, {**state.variables, "task": jnp.asarray(task, jnp.int32)}, None

        return enter


def own_scores(scores: jax.Array, task: jax.Array) -> jax.Array:
    """Returns, of scores ``[batch, tasks, classes]``, those of each example's own task ``[batch, classes]``."""
    one_hot = jax.nn.one_hot(task, scores.shape[1], dtype=scores.dtype)
    return jnp.einsum("btc,bt->bc", scores, one_hot, precision=jax.lax.Precision.HIGHEST)
