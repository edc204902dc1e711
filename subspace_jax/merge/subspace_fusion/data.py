"""Four tasks that conflict: scikit-learn's digits in four views, for one network with a frozen head."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import linalg, losses, nn

VIEWS = ("upright", "rotated", "mirrored", "flipped")
CLASSES, _WIDTHS, _SCALE = 10, (64, 128, 64), 8.0
_TEST, _BASE_IMAGES, _BATCH = 600, 80, 64
_BASE_STEPS, _BASE_RATE, _TUNE_STEPS, _TUNE_RATE = 400, 3e-3, 200, 1e-3
Params = dict[str, dict[str, jax.Array]]


class DigitViews(NamedTuple):
    """Models of the views, and images to measure them by.

    Attributes:
      base: Parameters of the base.
      finetuned: Parameters fine-tuned for each view.
      head: The frozen head ``[64, classes]``, common to all.
      inputs: Test images in all views, ``[examples, views, 64]`` float32 from -1 to 1, in an order for each.
      labels: ``[examples, views]`` int32.
    """

    base: Params
    finetuned: tuple[Params, ...]
    head: jax.Array
    inputs: np.ndarray
    labels: np.ndarray


@functools.cache
def digit_views(seed: int) -> DigitViews:
    """Trains a base on 80 images in all views, and fine-tunes it for each view; takes some seconds.

    Args:
      seed: Seed of images, networks and order.
    """
    from sklearn.datasets import load_digits

    rng, found = np.random.default_rng(seed), load_digits()
    order = rng.permutation(len(found.target))
    views, labels = _views((found.images[order] / 8 - 1).astype(np.float32)), found.target[order].astype(np.int32)
    draw, head_key, *keys = jax.random.split(jax.random.key(seed), len(VIEWS) + 3)
    head = linalg.random_orthonormal(head_key, _WIDTHS[-1], CLASSES)
    few = slice(_TEST, _TEST + _BASE_IMAGES)
    start = np.concatenate([view[few] for view in views]), np.tile(labels[few], len(views))
    base = _train(keys[-1], init_params(draw), head, *start, steps=_BASE_STEPS, rate=_BASE_RATE)
    finetuned = tuple(
        _train(key, base, head, view[_TEST:], labels[_TEST:], steps=_TUNE_STEPS, rate=_TUNE_RATE)
        for key, view in zip(keys, views, strict=False)
    )
    orders = [rng.permutation(_TEST) for _ in views]
    inputs = np.stack([view[:_TEST][own] for view, own in zip(views, orders, strict=True)], axis=1)
    return DigitViews(base, finetuned, head, inputs, np.stack([labels[:_TEST][own] for own in orders], axis=1))


def init_params(key: jax.Array) -> Params:
    """Draws a network 64-128-64: biases zero, weights N(0, 1 / (2 inputs)).

    From larger values networks learn less of their own, and their task vectors conflict less.
    """
    names, draw = ("hidden", "features"), jax.nn.initializers.variance_scaling(0.5, "fan_in", "normal")
    keys = jax.random.split(key, len(names))
    return {
        name: {"kernel": draw(own, shape), "bias": jnp.zeros(shape[1])}
        for name, own, shape in zip(names, keys, itertools.pairwise(_WIDTHS), strict=True)
    }


def apply(params: Params, head: jax.Array, x: jax.Array) -> jax.Array:
    """Maps images ``[batch, 64]`` to logits ``[batch, classes]``: features of one length, times the head."""
    features = nn.linear(jax.nn.relu(nn.linear(x, **params["hidden"])), **params["features"])
    norms = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + 1e-12)
    return nn.linear(_SCALE * features / norms, head)


def _views(images: np.ndarray) -> Sequence[np.ndarray]:
    """Images ``[n, 8, 8]`` as they are, rotated by 90 degrees, and reversed from left to right and up to down."""
    turned = (images, np.rot90(images, axes=(1, 2)), images[:, :, ::-1], images[:, ::-1])
    return [np.ascontiguousarray(x).reshape(len(x), -1) for x in turned]


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def _train(key: jax.Array, start: Params, head: jax.Array, x: jax.Array, y: jax.Array, *, steps: int, rate: float):
    tx = optax.adam(rate)

    def step(carry, rows):
        params, state = carry
        gradients = jax.grad(lambda p: jnp.mean(losses.cross_entropy(apply(p, head, x[rows]), y[rows])))(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = jax.random.randint(key, (steps, _BATCH), 0, len(y))
    return jax.lax.scan(step, (start, tx.init(start)), batches)[0][0]
