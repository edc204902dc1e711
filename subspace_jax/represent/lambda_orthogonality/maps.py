"""The maps of an upgrade: fitted in closed form and by gradient steps, applied one after another."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import linalg
from subspace_jax.represent.lambda_orthogonality.core import (
    Affine,
    CompatParams,
    CompatSettings,
    class_means,
    compat_loss,
)

METRICS, ORDERS = ("cosine", "l2"), ("worst", "typical")
_STEPS, _BATCH, _LEARNING_RATE = 600, 256, 1e-3
# Ridge penalties, in units of the mean eigenvalue of the covariance.
_PENALTIES = tuple(10.0 ** (i / 2) for i in range(-8, 3))


class Link(NamedTuple):
    """The maps from one model to the next.

    Attributes:
      maps: Both maps.
      centers: Class means, or centres of k-means, of mapped old vectors, ``[classes, n]``: what the order of
        re-embedding compares with.
    """

    maps: CompatParams
    centers: jax.Array


class Chain(NamedTuple):
    """One upgrade or more: the maps from an old model to the newest, over those between.

    Attributes:
      links: The upgrades, the oldest first.
      metric: "cosine" (vectors are divided by their lengths, before and after each map) or "l2".
      order: Which items of a store are best re-embedded first: "worst" or "typical", see :func:`ranked`.
    """

    links: tuple[Link, ...]
    metric: str
    order: str


class Ridge(NamedTuple):
    """A regression with a penalty on the kernel.

    Attributes:
      map: The map.
      outside: What the map gives for each example where that example is left out of the fit, ``[examples, m]``.
      penalty: The penalty, in units of the mean eigenvalue of the covariance.
    """

    map: Affine
    outside: jax.Array
    penalty: jax.Array


@jax.jit
def fit_ridge(x: jax.Array, y: jax.Array, weights: jax.Array, penalties: jax.Array) -> Ridge:
    """Affine regression of ``y`` on ``x``, with the penalty that has the least error where each example is left out.

    Leaving out has a closed form (Allen, Technometrics 1974).

    Args:
      x: ``[examples, n]``.
      y: ``[examples, m]``.
      weights: 1 for examples to fit to, 0 for others, ``[examples]``.
      penalties: Candidates, ``[penalties]``, above 0.
    """
    total = jnp.sum(weights)
    mean_x, mean_y = (linalg.times(weights[None], h) / total for h in (x, y))
    x, centred = x - mean_x, y - mean_y
    values, vectors = jnp.linalg.eigh(linalg.gram(x, weights[:, None] * x))
    z = linalg.times(x, vectors)
    target = linalg.gram(z, weights[:, None] * centred)
    shifts = penalties * jnp.mean(values)

    def residuals(shift):
        """Residuals of each example, by a fit without it."""
        inverse = 1 / (jnp.maximum(values, 0) + shift)
        left = centred - linalg.times(z, inverse[:, None] * target)
        leverage = weights * (jnp.sum(jnp.square(z) * inverse[None], axis=1) + 1 / total)
        return left / (1 - leverage)[:, None]

    errors = jax.lax.map(lambda shift: jnp.sum(weights[:, None] * jnp.square(residuals(shift))), shifts)
    best = jnp.argmin(errors)
    shift = shifts[best]
    kernel = linalg.times(vectors, target / (jnp.maximum(values, 0) + shift)[:, None])
    bias = (mean_y - linalg.times(mean_x, kernel))[0]
    return Ridge(Affine(kernel, bias), y - residuals(shift), penalties[best])


def penalties() -> jax.Array:
    """Returns the candidates of :func:`fit_ridge`."""
    return jnp.asarray(_PENALTIES, jnp.float32)


@functools.partial(jax.jit, static_argnames="lam")
def fit_backward(
    key: jax.Array, old: jax.Array, new: jax.Array, labels: jax.Array, weights: jax.Array, *, lam: float
) -> Affine:
    """Trains the near-orthogonal backward map by :func:`compat_loss`, from the orthogonal Procrustes solution.

    Args:
      key: Key of the batches.
      old: ``[pairs, m]``.
      new: ``[pairs, n]``.
      labels: ``[pairs]``.
      weights: 1 for pairs to fit to, 0 for others, ``[pairs]``.
      lam: Threshold on the root mean square of ``s^2 - 1`` over the singular values ``s``.
    """
    count = jnp.sum(weights)
    mean_old, mean_new = (linalg.times(weights[None], h) / count for h in (old, new))
    # In units of the old vectors' spread, so that the weights of the loss mean the same for vectors of any length.
    spread = jnp.sqrt(jnp.sum(weights[:, None] * jnp.square(old - mean_old)) / count)
    old, new, mean_old, mean_new = (h / spread for h in (old, new, mean_old, mean_new))
    rotation = linalg.orthogonal_procrustes(weights[:, None] * (new - mean_new), old - mean_old)
    start = Affine(rotation, (mean_old - linalg.times(mean_new, rotation))[0])
    settings = CompatSettings(weights=(1.0, 0.0, 0.1, 100.0), lam=lam * min(rotation.shape) ** 0.5)
    tx = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _STEPS))
    fitted = jnp.argsort(-weights)  # those to fit to come first
    forward = Affine(rotation.T, jnp.zeros_like(new[0]))  # has no weight in the loss

    def loss(backward, rows):
        return compat_loss(CompatParams(backward, forward), new[rows], old[rows], labels[rows], settings)[0]

    def step(carry, key):
        backward, state = carry
        rows = fitted[jax.random.randint(key, (min(_BATCH, len(old)),), 0, count.astype(jnp.int32))]
        updates, state = tx.update(jax.grad(loss)(backward, rows), state)
        return (optax.apply_updates(backward, updates), state), None

    end = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(key, _STEPS))[0][0]
    return end._replace(bias=spread * end.bias)


def prepared(x: jax.Array, metric: str) -> jax.Array:
    """Returns vectors as they are compared: divided by their lengths where the metric is the cosine."""
    return linalg.unit_vectors(x) if metric == "cosine" else x


def map_forward(chain: Chain, x: jax.Array) -> jax.Array:
    """Maps vectors of the oldest model, ``[items, m]``, to the space of the newest, ``[items, n]``."""
    x = prepared(x, chain.metric)
    for link in chain.links:
        x = prepared(link.maps.forward(x), chain.metric)
    return x


def map_backward(chain: Chain, x: jax.Array) -> jax.Array:
    """Maps vectors of the newest model, ``[items, n]``, to the space of the oldest, ``[items, m]``."""
    x = prepared(x, chain.metric)
    for link in reversed(chain.links):
        x = prepared(link.maps.backward(x), chain.metric)
    return x


def centers_of(mapped: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean of each class that occurs, ``[classes, n]``, of vectors ``[pairs, n]`` and their labels."""
    classes, index = np.unique(labels, return_inverse=True)
    return class_means(mapped, jnp.asarray(index, jnp.int32), len(classes))


def ranked(scores: jax.Array, order: str) -> jax.Array:
    """Returns the indices of items in the order in which to re-embed them, ``[items]`` int32.

    Args:
      scores: Those of :func:`backfill_scores`, ``[items]``.
      order: "worst": what lies farthest from all centres comes first, as in :func:`backfill_order`; "typical": what
        lies nearest to one.
    """
    return jnp.argsort(scores if order == "typical" else -scores).astype(jnp.int32)


def widths(chain: Chain) -> tuple[int, ...]:
    """Returns the widths of the spaces, the oldest first."""
    kernels = [link.maps.forward.kernel for link in chain.links]
    return (kernels[0].shape[0], *(kernel.shape[1] for kernel in kernels))


def joined(chains: Sequence[Chain], names: Sequence[str]) -> Chain:
    """Returns the chain of several, the oldest first.

    Raises:
      ValueError: One doesn't end in the space in which the next one begins, or they compare by different metrics.
    """
    for (one, two), (name, other) in zip(itertools.pairwise(chains), itertools.pairwise(names), strict=True):
        if widths(one)[-1] != widths(two)[0]:
            raise ValueError(
                f"maps: {name} maps to vectors of width {widths(one)[-1]}, but {other} takes those of width "
                f"{widths(two)[0]}; name the oldest upgrade first"
            )
        if one.metric != two.metric:
            raise ValueError(f"maps: {name} compares by {one.metric}, {other} by {two.metric}")
    return Chain(tuple(link for chain in chains for link in chain.links), chains[0].metric, chains[-1].order)
