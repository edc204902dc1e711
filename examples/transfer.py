"""A pretrained classifier that is adapted to other data, as a task of the train loop."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import adapters, losses
from subspace_jax.adapters.rules import path_of
from subspace_jax.train.fields import check_at_least

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]

_MOST_EPOCHS = 10_000


class TransferTask:
    """Classification by a frozen network with adapters, as a :class:`subspace_jax.train.Task`.

    ``params`` are the adapters, ``variables["base"]`` is the frozen network, which its checkpoints hold too: these
    networks are small, and come from no file.

    Args:
      apply: Maps parameters, which may be structured, and inputs ``[batch, ...]`` to logits ``[batch, classes]``.
      fresh: Draws random parameters from a key.
      pretrain: Makes from random parameters those that are adapted; called once, where a run begins.
      settings: Adapters; see :func:`subspace_jax.adapters.prepare`.
      seed: Seed of network and adapters.
      metrics: Makes means over an evaluation batch from logits and batch, by name.

    Raises:
      ValueError: A rule matches no parameter, or there is no rule.
    """

    def __init__(
        self,
        apply: Apply,
        fresh: Callable[[jax.Array], PyTree],
        pretrain: Callable[[PyTree], PyTree],
        settings: Mapping[str, Any],
        *,
        seed: int = 0,
        metrics: Callable[[jax.Array, Mapping[str, jax.Array]], dict[str, jax.Array]] | None = None,
    ):
        self._apply, self._fresh, self._pretrain = apply, fresh, pretrain
        self.settings, self._seed, self._metrics = settings, seed, metrics
        shapes = jax.eval_shape(fresh, jax.random.key(0))
        frozen, trainable = jax.eval_shape(self._prepare, jax.random.key(0), shapes)
        self._paths = [path_of(path).replace("/", ".") for path, _ in jax.tree_util.tree_leaves_with_path(frozen)]
        self._treedef = jax.tree.structure(frozen)
        names = jax.tree.map(lambda x: P(*(None,) * x.ndim), shapes)
        base, own = adapters.logical_axes(names, trainable, settings)
        self._axes = own, self._variables(base)
        self.table = adapters.describe(shapes, trainable, settings)

    def init(self, key):
        """Returns adapters of a random network, and this network."""
        weights_key, key = jax.random.split(key)
        frozen, trainable = self._prepare(key, self._fresh(weights_key))
        return trainable, self._variables(frozen)

    def load(self, shardings):
        """Returns adapters of the pretrained network, and this network."""
        weights_key, key = jax.random.split(jax.random.key(self._seed))
        frozen, trainable = self._prepare(key, self._pretrain(self._fresh(weights_key)))
        return jax.device_put((trainable, self._variables(frozen)), shardings)

    def axes(self):
        """Returns the logical axis names of parameters and variables: nothing is split."""
        return self._axes

    def loss(self, params, variables, batch, key):
        """Returns the mean cross-entropy over the batch, and the accuracy as a metric."""
        logits = self.logits(params, variables, batch["inputs"], key)
        return jnp.mean(losses.cross_entropy(logits, batch["labels"])), (
            variables,
            {"accuracy": jnp.mean(_hits(logits, batch["labels"]))},
        )

    def evaluate(self, params, variables, batch):
        """Returns sums over the real rows, and their number."""
        logits, real = self.logits(params, variables, batch["inputs"]), batch["mask"] > 0
        count = jnp.sum(real.astype(jnp.float32))
        own = self._metrics(logits, batch) if self._metrics else {}
        return {
            "loss": jnp.sum(losses.cross_entropy(logits, batch["labels"]), where=real),
            "accuracy": jnp.sum(_hits(logits, batch["labels"]), where=real),
            **{name: mean * count for name, mean in own.items()},
            "count": count,
        }

    def logits(self, params: PyTree, variables: PyTree, inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the logits ``[batch, classes]`` of the adapted network; a key is for adapters with dropout."""
        frozen = jax.tree.unflatten(self._treedef, [variables["base"][path] for path in self._paths])
        return self._apply(adapters.bind(frozen, params, self.settings, key=key), inputs)

    def _variables(self, frozen):
        # By path in a plain dict: a checkpoint knows nothing of weights with singular vectors.
        return {"base": dict(zip(self._paths, jax.tree.leaves(frozen), strict=True))}

    def _prepare(self, key, weights):
        frozen, trainable = adapters.prepare(key, weights, self.settings)
        # Copies: a parameter that trains as a whole begins as the frozen one, and a step donates both.
        return frozen, jax.tree.map(jnp.copy, trainable)


def train_whole(
    apply: Apply,
    params: PyTree,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    key: jax.Array,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> PyTree:
    """Trains a small classifier with Adam, all steps in one compiled scan.

    Args:
      apply: Maps parameters and inputs to logits.
      params: The start.
      inputs: ``[examples, ...]``, all on one device.
      labels: ``[examples]`` integers.
      key: Key of the order of the examples.
      epochs: Passes; what is left of the last batch of each is left out.
      batch_size: Rows of a batch.
      learning_rate: Of Adam, constant.

    Returns:
      The trained parameters.
    """
    tx, steps = optax.adam(learning_rate), len(labels) // batch_size
    orders = jax.vmap(lambda k: jax.random.permutation(k, len(labels)))(jax.random.split(key, epochs))
    rows = orders[:, : steps * batch_size].reshape(-1, batch_size)

    def loss(params, x, y):
        return jnp.mean(losses.cross_entropy(apply(params, x), y))

    @jax.jit
    def run(params, inputs, labels):
        def step(carry, row):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, inputs[row], labels[row]), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]

    trained = run(params, jnp.asarray(inputs), jnp.asarray(labels))
    if not all(np.isfinite(x).all() for x in jax.device_get(jax.tree.leaves(trained))):
        raise ValueError(f"pretrain.learning_rate: parameters are not finite any more at {learning_rate}")
    return trained


def check_pretraining(fields: ConfigDict) -> None:
    """Raises a ValueError where the fields ``pretrain`` can't serve; the orders of all epochs are one array."""
    check_at_least("pretrain.learning_rate", fields.learning_rate, 0)
    check_at_least("pretrain.epochs", fields.epochs, 0)
    if fields.epochs > _MOST_EPOCHS:
        raise ValueError(f"pretrain.epochs: expected at most {_MOST_EPOCHS}, got {fields.epochs}")


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
