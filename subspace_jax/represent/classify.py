"""Image classification with a linear, a cosine or a Grassmann head, as a task of the train loop.

The Grassmann head is the class representation of arXiv 2308.01547 (Wang, Li, Zhang, ICCV 2023).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import losses, nn, train

HEADS = ("softmax", "cosine", "grassmann")
BACKBONES = ("mlp", "convnet")


class Classifier(nnx.Module):
    """A backbone and a head.

    Args:
      backbone: Maps inputs ``[batch, ...]`` to features ``[batch, n]``.
      head: Maps features to logits ``[batch, classes]``.
    """

    def __init__(self, backbone: nnx.Module, head: nnx.Module):
        self.backbone = backbone
        self.head = head

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps inputs ``[batch, ...]`` to logits ``[batch, classes]``."""
        return self.head(self.backbone(inputs))


def make_classifier(
    key: jax.Array,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    backbone: str = "mlp",
    features: Sequence[int] = (128, 64),
    head: str = "grassmann",
    dims: int | Sequence[int] = 8,
    gamma: float = 25.0,
    dtype: str = "float32",
) -> Classifier:
    """Builds a classifier.

    Args:
      key: Random key of the parameters.
      input_shape: Shape of one input, channels last.
      num_classes: Number of classes.
      backbone: "mlp" or "convnet".
      features: Widths of the backbone's layers or stages; an "mlp" of none hands the input on.
      head: "softmax", "cosine" or "grassmann".
      dims: Dimension of the class subspaces, or one for each class.
      gamma: Scale of the logits of the cosine and Grassmann heads.
      dtype: Type of the activations; parameters are float32.

    Returns:
      The module.

    Raises:
      ValueError: A name is unknown, or the head refuses its sizes.
    """
    rngs = nnx.Rngs(params=key)
    if backbone == "mlp":
        body = nn.MLP(_product(input_shape), features, dtype=dtype, rngs=rngs)
    elif backbone == "convnet":
        body = nn.ConvNet(input_shape[-1], features, dtype=dtype, rngs=rngs)
    else:
        raise ValueError(f"model.backbone: expected one of {BACKBONES}, got {backbone!r}")
    if head == "softmax":
        top = nn.SoftmaxHead(body.out_features, num_classes, rngs=rngs)
    elif head == "cosine":
        top = nn.CosineHead(body.out_features, num_classes, gamma=gamma, rngs=rngs)
    elif head == "grassmann":
        top = nn.GrassmannHead(body.out_features, num_classes, dims=dims, gamma=gamma, rngs=rngs)
    else:
        raise ValueError(f"model.head: expected one of {HEADS}, got {head!r}")
    return Classifier(body, top)


def _product(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


class ClassifierTask:
    """Classification as a :class:`subspace_jax.train.Task`.

    Batches hold ``inputs [batch, ...]``, ``labels [batch]`` and, for evaluation, ``mask [batch]``.

    Args:
      make: Builds the module from a key; the module has a ``backbone`` and a ``head``.
      label_smoothing: See :func:`subspace_jax.losses.cross_entropy`.
    """

    def __init__(self, make, *, label_smoothing: float = 0.0):
        self._make = make
        self._label_smoothing = label_smoothing
        self._graph, self._axes = train.split_module(make)

    def init(self, key):
        """Returns fresh parameters and variables."""
        return train.module_arrays(self._make(key))

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        return self._axes

    def module(self, params, variables) -> Classifier:
        """Returns the module with these arrays."""
        return nnx.merge(self._graph, params, variables)

    def loss(self, params, variables, batch, key):
        """Returns the mean cross-entropy over the batch, and the accuracy as a metric."""
        del key
        model = self.module(params, variables)
        logits = model(batch["inputs"])
        loss = jnp.mean(losses.cross_entropy(logits, batch["labels"], self._label_smoothing))
        accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32))
        return loss, (train.module_arrays(model)[1], {"accuracy": accuracy})

    def evaluate(self, params, variables, batch):
        """Returns sums of cross-entropy (no smoothing) and hits over the real rows, and their number."""
        logits = self.module(params, variables)(batch["inputs"])
        mask = batch["mask"]
        hits = (jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32)
        return {
            "loss": jnp.sum(mask * losses.cross_entropy(logits, batch["labels"])),
            "accuracy": jnp.sum(mask * hits),
            "count": jnp.sum(mask),
        }

    def features(self, params, variables, inputs: jax.Array) -> jax.Array:
        """Returns the features ``[batch, n]`` that the head sees."""
        return self.module(params, variables).backbone(inputs)


def default_config() -> ConfigDict:
    """Returns the fields of a classification run.

    ``data.name`` is "union_of_subspaces" (synthetic), "digits", or any image set of TensorFlow Datasets that is
    prepared under ``data.data_dir`` (empty: the usual place).  ``model.dims`` holds one dimension for all classes,
    or one for each.
    """
    config = train.default_config()
    config.task = "subspace_jax.represent.classify"
    config.data = ConfigDict(
        {
            "name": "digits",
            "data_dir": "",
            "train_split": "train",
            "eval_split": "test",
            "batch_size": 64,
            "eval_batch_size": 256,
            "augment": False,
        }
    )
    config.model = ConfigDict(
        {
            "backbone": "mlp",
            "features": (128, 64),
            "head": "grassmann",
            "dims": (8,),
            "gamma": 25.0,
            "label_smoothing": 0.0,
            "dtype": "float32",
        }
    )
    return config.lock()
