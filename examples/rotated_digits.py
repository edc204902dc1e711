"""Adapts a network for digits to digits rotated by 90 degrees.

The network alone reads them no better than chance, so that the accuracy is a test of the adapter.
"""

import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn.datasets import load_digits

from examples.transfer import ClassificationTask, TransferTask, phases
from subspace_jax import nn, train

WIDTHS = (64, 128, 128, 10)
HIDDEN = ("layer1", "layer2")
NUM_TRAIN = 1200


def default_config() -> ConfigDict:
    """Returns the fields of a run: those of every run, and ``adapter`` of :func:`subspace_jax.train.default_adapter`.

    ``pretrain.epochs`` and ``pretrain.learning_rate`` are those of the network, on upright digits.  ``seed`` also
    chooses the 1200 of the 1797 images for training.
    """
    config = train.default_config()
    config.task = "examples.rotated_digits"
    config.train.best = "max:accuracy"
    config.train.epochs = 30.0
    config.data = ConfigDict({"batch_size": 64, "eval_batch_size": 200})
    config.pretrain = ConfigDict({"epochs": 40, "learning_rate": 1e-3})
    config.adapter = train.default_adapter()
    config.optim.name = "adamw"
    config.optim.schedule = "constant"
    config.optim.learning_rate = 5e-3
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, see :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field is invalid.
    """
    settings = train.adapter_settings(config.adapter, HIDDEN)
    images, labels = digits(config.seed)
    sets = [labelled_data(x.reshape(-1, 64), labels, config.data) for x in (images, np.rot90(images, axes=(1, 2)))]
    tasks = ClassificationTask(mlp, mlp_init), TransferTask(mlp, mlp_init, settings)
    return train.Run(phases(*tasks, tuple(sets), config.pretrain))


def labelled_data(inputs: np.ndarray, labels: np.ndarray, sizes: ConfigDict) -> train.DataSpec:
    """Returns data of which the first 1200 examples are for training and the rest for evaluation."""
    learn, test = (
        {"inputs": np.ascontiguousarray(inputs[part]), "labels": labels[part]}
        for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))
    )
    return train.array_data(
        learn, batch_size=sizes.batch_size, evaluate={"eval": test}, eval_batch_size=sizes.eval_batch_size
    )


def mlp_init(key: jax.Array) -> dict:
    """Draws a network 64-128-128-10: weights N(0, 1 / inputs), biases zero."""
    names = (*HIDDEN, "head")
    return {
        name: {
            "kernel": jax.random.normal(own, (m, k), np.float32) / np.float32(np.sqrt(m)),
            "bias": jax.numpy.zeros(k, np.float32),
        }
        for name, own, m, k in zip(names, jax.random.split(key, 3), WIDTHS[:-1], WIDTHS[1:], strict=True)
    }


def mlp(params: dict, x: jax.Array) -> jax.Array:
    """Maps pixels ``[batch, 64]`` to logits ``[batch, 10]``; kernels may be structured."""
    for name in HIDDEN:
        x = jax.nn.relu(nn.linear(x, **params[name]))
    return nn.linear(x, **params["head"])


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images ``[1797, 8, 8]`` from 0 to 1, and labels, in an order drawn by a seed."""
    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    return (found.images[order] / 16).astype(np.float32), found.target[order].astype(np.int32)
