"""Runs that adapt a network for digits to digits that are turned by 90 degrees.

A network that has never seen them fails at once, and only the adapted weights can repair it: so the figure is a test of
the adapter and not of the network.
"""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict
from sklearn.datasets import load_digits

from examples.transfer import TransferTask, check_pretraining, train_whole
from subspace_jax import data, nn, train

WIDTHS = (64, 128, 128, 10)
HIDDEN = ("layer1", "layer2")
NUM_TRAIN = 1200


def default_config() -> ConfigDict:
    """Returns the fields of a run: those of every run, and ``adapter`` of :func:`subspace_jax.train.default_adapter`.

    ``pretrain.epochs`` and ``pretrain.learning_rate`` are of the network itself, on upright digits.  ``seed`` decides
    on the network, on the adapters and on which 1200 of the 1797 images they train.
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


def build(config: ConfigDict) -> tuple[TransferTask, train.Data]:
    """Makes the task and the data of a config, as :func:`subspace_jax.train.build` asks for them.

    Raises:
      ValueError: A field can't serve.
    """
    check_pretraining(config.pretrain)
    settings = train.adapter_settings(config.adapter, HIDDEN)
    images, labels = digits(config.seed)
    upright, turned = (x.reshape(-1, 64) for x in (images, np.rot90(images, axes=(1, 2))))
    pretrain = functools.partial(
        train_whole,
        mlp,
        inputs=upright[:NUM_TRAIN],
        labels=labels[:NUM_TRAIN],
        key=jax.random.key(config.seed + 1),
        epochs=config.pretrain.epochs,
        learning_rate=config.pretrain.learning_rate,
    )
    task = TransferTask(mlp, mlp_init, pretrain, settings, seed=config.seed)
    sizes, examples = config.data, {"inputs": np.ascontiguousarray(turned), "labels": labels}
    learn, test = (
        {name: x[part] for name, x in examples.items()} for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))
    )
    batches = functools.partial(data.train_batches, learn, batch_size=sizes.batch_size)
    batches(seed=config.seed)  # what is wrong with batch size or seed shows now
    return task, train.Data(
        batch_size=sizes.batch_size,
        steps_per_epoch=data.steps_per_epoch(NUM_TRAIN, sizes.batch_size),
        train=lambda seed: batches(seed=seed),
        evaluate=data.eval_passes(test, sizes.eval_batch_size),
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
    """Images ``[1797, 8, 8]`` from 0 to 1, and labels, in the order of a seed."""
    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    return (found.images[order] / 16).astype(np.float32), found.target[order].astype(np.int32)
