"""A pair of models that were trained apart, the newer one better: two small networks for scikit-learn's digits."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import data, losses, nn

FEATURES = 16
OLD_CLASSES = 5
_HIDDEN = {"old": 32, "new": 128}
_STEPS, _LEARNING_RATE = 400, 3e-3
Layers = Sequence[tuple[jax.Array, jax.Array]]


def digits_pair(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Trains both networks, and returns the vectors that they give of all digits; takes some seconds.

    Each is 64-h-16-10 with ReLU after both hidden layers but the last, trained by 400 full-batch steps of Adam.  The
    old one has 32 hidden units and sees the digits 0 to 4 only; the new one has 128 and sees all.

    Args:
      seed: Seed of the start of both.

    Returns:
      The sets "train" (1200 examples) and "eval" (597), each with ``old`` and ``new`` ``[examples, 16]`` and
      ``labels``.
    """
    sets = {}
    for name, split in (("train", "train"), ("eval", "test")):
        arrays = data.load_arrays(data.image_source("digits", split))
        sets[name] = arrays["inputs"].reshape(-1, 64), arrays["labels"].astype(np.int32)
    x, y = sets["train"]
    seen = y < OLD_CLASSES
    nets = {
        "old": _train(jax.random.key(2 * seed), _HIDDEN["old"], x[seen], y[seen]),
        "new": _train(jax.random.key(2 * seed + 1), _HIDDEN["new"], x, y),
    }
    return {
        name: {**{net: np.asarray(_hidden(layers[:-1], x)) for net, layers in nets.items()}, "labels": y}
        for name, (x, y) in sets.items()
    }


def _train(key: jax.Array, hidden: int, x: np.ndarray, y: np.ndarray) -> Layers:
    shapes = itertools.pairwise((64, hidden, FEATURES, 10))
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 3)
    layers = [(draw(own, shape), jnp.zeros(shape[1])) for own, shape in zip(keys, shapes, strict=True)]
    tx = optax.adam(_LEARNING_RATE)

    def loss(layers):
        return jnp.mean(losses.cross_entropy(_hidden(layers, x), y))

    def step(carry, _):
        layers, state = carry
        updates, state = tx.update(jax.grad(loss)(layers), state)
        return (optax.apply_updates(layers, updates), state), None

    return jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), length=_STEPS)[0][0])(layers)


def _hidden(layers: Layers, x: np.ndarray) -> jax.Array:
    """Returns what the last of these layers gives, before any ReLU."""
    h = jnp.asarray(x)
    for i, (kernel, bias) in enumerate(layers):
        h = nn.linear(jax.nn.relu(h) if i else h, kernel, bias)
    return h
