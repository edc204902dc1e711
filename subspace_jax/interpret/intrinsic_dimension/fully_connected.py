"""Image classification by a fully connected network: the networks of arXiv 1804.08838."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import data, losses, nn, train
from subspace_jax.interpret import intrinsic_dimension


class FullyConnectedTask(train.Task):
    """A network of linear layers with a ReLU between them, as a :class:`subspace_jax.train.Task`.

    Batches hold ``inputs [batch, ...]``, ``labels [batch]`` and, for evaluation, ``mask [batch]``.

    Args:
      widths: Width of a flattened input, of the hidden layers, and number of classes.
      l2: Factor on half the squares of the kernels' entries, in the loss.
    """

    def __init__(self, widths: Sequence[int], l2: float = 0.0):
        self._widths, self._l2 = tuple(widths), l2

    def init(self, key):
        """Returns layers with kernels of He's normal distribution and biases of zero, and no variables."""
        draw = jax.nn.initializers.he_normal()
        sizes = list(itertools.pairwise(self._widths))
        keys = jax.random.split(key, len(sizes))
        layers = [
            {"kernel": draw(own, size, jnp.float32), "bias": jnp.zeros(size[1], jnp.float32)}
            for own, size in zip(keys, sizes, strict=True)
        ]
        return {f"layer{i}": layer for i, layer in enumerate(layers)}, {}

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        names = [("embed", "mlp") if i % 2 == 0 else ("mlp", "embed") for i in range(len(self._widths) - 1)]
        return {f"layer{i}": {"kernel": P(*axes), "bias": P(axes[1])} for i, axes in enumerate(names)}, {}

    def loss(self, params, variables, batch, *, key, step):
        """Returns the mean cross-entropy over the batch with the penalty, and the accuracy as a metric."""
        del key, step
        logits = self.logits(params, batch["inputs"])
        loss = jnp.mean(losses.cross_entropy(logits, batch["labels"]))
        if self._l2:
            loss += self._l2 * sum(0.5 * jnp.sum(jnp.square(layer["kernel"])) for layer in params.values())
        return loss, (variables, {"accuracy": jnp.mean(_hits(logits, batch["labels"]))})

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums of cross-entropy and correct predictions, and the number of examples."""
        del variables, key
        logits, real = self.logits(params, batch["inputs"]), batch["mask"] > 0
        return {
            "loss": jnp.sum(losses.cross_entropy(logits, batch["labels"]), where=real),
            "accuracy": jnp.sum(_hits(logits, batch["labels"]), where=real),
            "count": jnp.sum(real.astype(jnp.float32)),
        }

    def logits(self, params, inputs: jax.Array) -> jax.Array:
        """Maps inputs ``[batch, ...]`` to logits ``[batch, classes]``."""
        x = inputs.reshape(inputs.shape[0], -1)
        for i in range(len(self._widths) - 1):
            x = nn.linear(jax.nn.relu(x) if i else x, **params[f"layer{i}"])
        return x


def default_config() -> ConfigDict:
    """Returns the fields of a run on an image set, with those that measure its intrinsic dimension.

    ``data`` is as for :func:`subspace_jax.represent.classify.default_config`; ``model.features`` are the hidden widths
    and ``model.l2`` is the factor on half the squares of the kernels.
    """
    config = train.default_config()
    config.task = "subspace_jax.interpret.intrinsic_dimension.fully_connected"
    config.train.best = "max:accuracy"
    config.data = ConfigDict(
        {
            "name": "digits",
            "data_dir": "",
            "train_split": "train",
            "eval_split": "test",
            "batch_size": 128,
            "eval_batch_size": 600,
        }
    )
    config.model = ConfigDict({"features": (64,), "l2": 0.0})
    config.optim.name = "adam"
    config.optim.kwargs = {"b2": 0.99}
    config.optim.schedule = "constant"
    config.intrinsic = intrinsic_dimension.default_intrinsic()
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Makes the run of a config, as :func:`subspace_jax.train.build` asks for it.

    Raises:
      ValueError: A field can't serve.
      FileNotFoundError: The data set is not prepared; the message says how to.
    """
    sizes, model = config.data, config.model
    if min(model.features, default=1) < 1:
        raise ValueError(f"model.features: expected widths of at least 1, got {tuple(model.features)}")
    if model.l2 < 0:
        raise ValueError(f"model.l2: expected at least 0, got {model.l2}")
    sources = [
        data.image_source(sizes.name, split, sizes.data_dir or None) for split in (sizes.train_split, sizes.eval_split)
    ]
    learn, test = (data.load_arrays(source) for source in sources)
    sets = {"evaluate": {"eval": test}, "eval_batch_size": sizes.eval_batch_size}
    examples = train.array_data(learn, batch_size=sizes.batch_size, **sets)
    widths = (math.prod(sources[0].image_shape), *model.features, sources[0].num_classes)
    return train.Run((train.Phase("train", FullyConnectedTask(widths, model.l2), examples),))


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
