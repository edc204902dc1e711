"""Tip-Adapter: a cache of labelled features beside the zero-shot classifier, training-free or with trained keys.

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (arXiv 2207.09519).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import losses
from subspace_jax.linalg import times, unit_vectors, working_dtype
from subspace_jax.represent.few_shot_survey.fitting import adamw_to_zero, fit_steps
from subspace_jax.represent.few_shot_survey.prototypes import (
    check_labels,
    check_lengths,
    check_widths,
    zero_shot_logits,
)


class TipCache(NamedTuple):
    """Labelled features.

    Attributes:
      keys: ``[examples, n]``; unit vectors until they are trained.
      values: Class of each key, ``[examples]`` int32; they stand for the one-hot rows of the paper's ``V``.
    """

    keys: jax.Array
    values: jax.Array


class TipSearch(NamedTuple):
    """The best sharpness and weight of a cache.

    Attributes:
      beta: Sharpness.
      alpha: Weight of the cache.
      accuracy: Their accuracy on the validation examples, in ``[0, 1]``.
      accuracies: Those of the whole grid, ``[betas, alphas]`` float32.
    """

    beta: float
    alpha: float
    accuracy: float
    accuracies: np.ndarray


def build_cache(features: jax.Array, labels: jax.Array, num_classes: int) -> TipCache:
    """Makes a cache of support features.

    Args:
      features: ``[examples, n]``, or ``[views, examples, n]`` of several augmentations, which are averaged before they
        are normalized.
      labels: ``[examples]`` integers.
      num_classes: Number of classes.

    Returns:
      The cache, in float32 or wider.

    Raises:
      ValueError: Shapes don't match, or, where they are not traced, a label is out of range or a feature is zero.
    """
    features = jnp.asarray(features, working_dtype(features))
    features = jnp.mean(features, axis=0) if features.ndim == 3 else features
    check_labels(features, labels, num_classes)
    check_lengths("features", features)
    return TipCache(unit_vectors(features), jnp.asarray(labels, jnp.int32))


def tip_logits(
    features: jax.Array,
    cache: TipCache,
    text: jax.Array,
    alpha: jax.typing.ArrayLike = 1.0,
    beta: jax.typing.ArrayLike = 5.5,
    scale: jax.typing.ArrayLike = 100.0,
    *,
    block_size: int = 1024,
) -> jax.Array:
    """Adds to the zero-shot logits the votes of the cache, ``alpha sum_j exp(-beta (1 - cos(f, key_j)))`` by class.

    Streams over the keys: holds ``[examples, block_size]`` affinities at a time, in the backward pass too, and sums
    them by label instead of multiplying by one-hot values.

    Args:
      features: ``[examples, n]``, floating point, of any length.
      cache: The cache.
      text: Prototypes ``[classes, n]``.
      alpha: Weight of the cache; 0 gives the zero-shot logits.
      beta: Sharpness, at least 0: 0 counts the keys of each class, a large one leaves the nearest key.
      scale: See :func:`zero_shot_logits`.
      block_size: Keys compared at a time.

    Returns:
      Logits ``[examples, classes]``, float32 or wider.

    Raises:
      ValueError: The widths differ, or ``beta`` is not traced and below 0.
    """
    check_widths(features, text)
    check_widths(features, cache.keys)
    check_beta(beta)
    zero_shot = zero_shot_logits(features, text, scale)
    dtype = zero_shot.dtype
    unit, sharpness = unit_vectors(features.astype(dtype)), jnp.asarray(beta, dtype)
    num_classes = text.shape[0]

    def add(votes, block, is_key):
        keys, values = block
        weights = jnp.where(is_key[:, None], jnp.exp(-sharpness * (1.0 - times(keys.astype(dtype), unit.T))), 0.0)
        return votes + jax.ops.segment_sum(weights, values, num_classes)

    start = jnp.zeros((num_classes, features.shape[0]), dtype)
    votes = losses.scan_keys(add, start, cache, block_size)
    return zero_shot + jnp.asarray(alpha, dtype) * votes.T


def tip_grid(scale: tuple[float, float] = (7.0, 3.0), steps: tuple[int, int] = (200, 20)) -> tuple[np.ndarray, ...]:
    """The paper's code's grid: ``0.1 + i (scale - 0.1) / steps`` for ``i`` from 0 to ``steps - 1``.

    Args:
      scale: Ends of beta and of alpha; (7, 3) on ImageNet, (12, 5) on Caltech101.
      steps: Number of each.

    Returns:
      Betas and alphas.
    """
    return tuple(0.1 + np.arange(n) * (end - 0.1) / n for end, n in zip(scale, steps, strict=True))


def search_tip(
    features: jax.Array,
    labels: jax.Array,
    cache: TipCache,
    text: jax.Array,
    betas: np.ndarray,
    alphas: np.ndarray,
    *,
    scale: float = 100.0,
) -> TipSearch:
    """Finds the sharpness and weight of a cache that are best on validation examples, which it must not hold.

    The affinities of an example are computed once for the whole grid.  Of equally good pairs that with the smallest
    index is taken, alpha varying faster, as in the authors' loop.  Holds 64 x keys affinities at a time.

    Args:
      features: Validation features ``[examples, n]``.
      labels: ``[examples]`` integers.
      cache: The cache.
      text: Prototypes ``[classes, n]``.
      betas: Sharpnesses to try, at least 0.
      alphas: Weights to try.
      scale: See :func:`zero_shot_logits`.

    Returns:
      The best pair.

    Raises:
      ValueError: Shapes don't match, a label is out of range, a grid is empty or a beta is below 0.
    """
    check_widths(features, text)
    check_widths(features, cache.keys)
    check_labels(features, labels, text.shape[0])
    betas, alphas = np.asarray(betas), np.asarray(alphas)
    if not betas.size or not alphas.size:
        raise ValueError(f"betas, alphas: expected one or more of each, got {betas.size} and {alphas.size}")
    check_beta(betas)
    hits = _grid_hits(features, jnp.asarray(labels, jnp.int32), cache, text, (betas, alphas, scale))
    accuracies = np.asarray(hits, np.float32) / np.float32(features.shape[0])
    best = np.unravel_index(int(np.argmax(hits)), hits.shape)
    return TipSearch(float(betas[best[0]]), float(alphas[best[1]]), float(accuracies[best]), accuracies)


def fit_tip_f(
    cache: TipCache,
    text: jax.Array,
    order: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 5.5,
    scale: float = 100.0,
    tx: optax.GradientTransformation | None = None,
) -> tuple[TipCache, jax.Array]:
    """Trains the keys of a cache on its own examples (Tip-Adapter-F); the values stay.

    Args:
      cache: The cache, whose keys are the examples too.
      text: Prototypes ``[classes, n]``.
      order: Indices of the examples of each step, ``[steps, batch]``; see :func:`batch_order`.
      alpha: Weight of the cache while it is trained.
      beta: Sharpness while it is trained, at least 0.
      scale: See :func:`zero_shot_logits`.
      tx: Optimizer; by default that of the authors' code, AdamW from 1e-3 to 0 along a cosine over all steps.  The same
        object compiles once.

    Returns:
      The cache with trained keys, which are not normalized, and the mean cross-entropy before each step, ``[steps]``.

    Raises:
      ValueError: The widths differ, or ``beta`` is below 0.
    """
    check_widths(cache.keys, text)
    check_beta(beta)
    tx = adamw_to_zero(1e-3, len(order)) if tx is None else tx
    rest = (cache.values, text, alpha, beta, scale)
    keys, trace = fit_steps(_tip_loss, tx, cache.keys, order, (cache.keys, cache.values), rest)
    return TipCache(keys, cache.values), trace


def check_beta(beta: jax.typing.ArrayLike) -> None:
    """Raises a ValueError for a sharpness below 0; a traced one passes."""
    if not isinstance(beta, jax.core.Tracer) and not np.all(np.asarray(beta) >= 0):
        raise ValueError(f"beta: expected at least 0, got {beta}")


def _tip_loss(keys, batch, values, text, alpha, beta, scale):
    features, labels = batch
    logits = tip_logits(features, TipCache(keys, values), text, alpha, beta, scale)
    return jnp.mean(losses.cross_entropy(logits, labels))


@jax.jit
def _grid_hits(features, labels, cache, text, grid) -> jax.Array:
    """Counts the examples that each pair of the grid classifies correctly, ``[betas, alphas]`` int32."""
    zero_shot = zero_shot_logits(features, text, grid[2])
    dtype, num_classes = zero_shot.dtype, text.shape[0]
    unit = unit_vectors(features.astype(dtype))
    betas, alphas = (jnp.asarray(part, dtype) for part in grid[:2])

    def of_example(example):
        vector, own, label = example
        distances = 1.0 - times(cache.keys.astype(dtype), vector[:, None])[:, 0]

        def of_beta(beta):
            votes = jax.ops.segment_sum(jnp.exp(-beta * distances), cache.values, num_classes)
            logits = own[None] + alphas[:, None] * votes[None]
            return jnp.argmax(logits, axis=1).astype(jnp.int32) == label

        return jax.lax.map(of_beta, betas)

    def add(hits, block, is_example):
        found = jax.vmap(of_example)(block) & is_example[:, None, None]
        return hits + jnp.sum(found, axis=0, dtype=jnp.int32)

    start = jnp.zeros((betas.shape[0], alphas.shape[0]), jnp.int32)
    return losses.scan_keys(add, start, (unit, zero_shot, labels), 64)
