"""A classifier that is pretrained in one phase of a run and adapted to other data in the next."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import adapters, losses, train
from subspace_jax.adapters.rules import path_of
from subspace_jax.train.fields import check_at_least

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]

_MOST_EPOCHS = 10_000


class ClassificationTask(train.Task):
    """Classification by a network that is trained in full.

    Args:
      apply: Maps parameters and inputs ``[batch, ...]`` to logits ``[batch, classes]``.
      fresh: Draws random parameters from a key.
    """

    def __init__(self, apply: Apply, fresh: Callable[[jax.Array], PyTree]):
        self._apply, self._fresh = apply, fresh

    def init(self, key):
        """Returns random parameters."""
        return self._fresh(key), {}

    def loss(self, params, variables, batch, *, key, step):
        """Returns the mean cross-entropy over the batch, and the accuracy as a metric."""
        logits = self.logits(params, variables, batch["inputs"], key)
        loss = jnp.mean(losses.cross_entropy(logits, batch["labels"]))
        return loss, (variables, {"accuracy": jnp.mean(_hits(logits, batch["labels"]))})

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums over the examples that are not padding, and their number."""
        logits, real = self.logits(params, variables, batch["inputs"]), batch["mask"] > 0
        return {
            "loss": jnp.sum(losses.cross_entropy(logits, batch["labels"]), where=real),
            "accuracy": jnp.sum(_hits(logits, batch["labels"]), where=real),
            "count": jnp.sum(batch["mask"]),
        }

    def logits(self, params: PyTree, variables: PyTree, inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the logits ``[batch, classes]``; a key is for dropout."""
        del variables, key
        return self._apply(params, inputs)


class TransferTask(ClassificationTask):
    """Classification by a frozen network with adapters.

    ``params`` are the adapters.  ``variables["base"]`` is the frozen network, which checkpoints hold too: it comes from
    the phase before, and from no file.

    Args:
      apply: Maps parameters, which may be structured, and inputs to logits.
      fresh: Draws random parameters from a key.
      settings: Adapters; see :func:`subspace_jax.adapters.prepare`.
      renewed: Entries of the network that :meth:`enter` draws anew, such as the head for other classes.

    Raises:
      ValueError: A rule matches no parameter, or there is no rule.
    """

    def __init__(
        self,
        apply: Apply,
        fresh: Callable[[jax.Array], PyTree],
        settings: Mapping[str, Any],
        *,
        renewed: Sequence[str] = (),
    ):
        super().__init__(apply, fresh)
        self.settings, self._renewed = settings, tuple(renewed)
        shapes = jax.eval_shape(fresh, jax.random.key(0))
        frozen, trainable = jax.eval_shape(self._prepare, jax.random.key(0), shapes)
        self._paths = [path_of(path).replace("/", ".") for path, _ in jax.tree_util.tree_leaves_with_path(frozen)]
        self._treedef = jax.tree.structure(frozen)
        names = jax.tree.map(lambda x: P(*(None,) * x.ndim), shapes)
        base, own = adapters.logical_axes(names, trainable, settings)
        self._axes, self._roles = (own, self._variables(base)), adapters.roles(trainable, settings)
        self.table = adapters.describe(shapes, trainable, settings)

    def init(self, key):
        """Returns adapters of a random network, and this network."""
        weights_key, key = jax.random.split(key)
        return self._adapted(key, self._fresh(weights_key))

    def enter(self, state: train.TrainState, at: train.At) -> tuple[PyTree, PyTree, None]:
        """Returns adapters of the network that the phase before has trained, and this network."""
        weights_key, key = jax.random.split(at.key)
        fresh = self._fresh(weights_key)
        weights = {**state.params, **{name: fresh[name] for name in self._renewed}}
        return *self._adapted(key, weights), None

    def axes(self):
        """Returns the logical axis names of parameters and variables: nothing is sharded."""
        return self._axes

    def roles(self):
        """Returns the roles of the adapters' parameters."""
        return self._roles

    def logits(self, params, variables, inputs, key=None):
        """Returns the logits ``[batch, classes]`` of the adapted network; a key is for dropout."""
        frozen = jax.tree.unflatten(self._treedef, [variables["base"][path] for path in self._paths])
        return self._apply(adapters.bind(frozen, params, self.settings, key=key), inputs)

    def _adapted(self, key, weights):
        frozen, trainable = self._prepare(key, weights)
        return trainable, self._variables(frozen)

    def _variables(self, frozen):
        # By path in a plain dict: a checkpoint knows nothing of weights with singular vectors.
        return {"base": dict(zip(self._paths, jax.tree.leaves(frozen), strict=True))}

    def _prepare(self, key, weights):
        frozen, trainable = adapters.prepare(key, weights, self.settings)
        # Copies: a parameter that is trained in full starts as the frozen one, and a step donates both.
        return frozen, jax.tree.map(jnp.copy, trainable)


def phases(
    pretrained: ClassificationTask,
    adapted: TransferTask,
    data: tuple[train.DataSpec, train.DataSpec],
    fields: ConfigDict,
) -> tuple[train.Phase, train.Phase]:
    """Returns the phases of a run: pretraining by Adam at a constant rate, and adaptation as the config says.

    Args:
      pretrained: The network that is trained in full.
      adapted: The network with adapters.
      data: The data of both.
      fields: ``pretrain`` of the config: ``epochs`` and ``learning_rate``.

    Raises:
      ValueError: A field is out of range.
    """
    check_at_least("pretrain.learning_rate", fields.learning_rate, 0)
    check_at_least("pretrain.epochs", fields.epochs, 1)
    if fields.epochs > _MOST_EPOCHS:
        raise ValueError(f"pretrain.epochs: expected at most {_MOST_EPOCHS}, got {fields.epochs}")
    steps = fields.epochs * data[0].steps_per_epoch
    return (
        train.Phase("pretrain", pretrained, data[0], steps, optax.adam(fields.learning_rate)),
        train.Phase("adapt", adapted, data[1], enter=adapted.enter),
    )


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
