"""Scores of sparse codes: what they explain, how they part classes, which features are active together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import gram, working_dtype
from subspace_jax.metrics.separability import logistic_weights

_AT_A_TIME = 256


def explained_variance(x: jax.Array, recon: jax.Array) -> jax.Array:
    """Returns ``1 - sum ||x - recon||^2 / sum ||x - mean(x)||^2``, a scalar.

    Args:
      x: ``[examples, d]``.
      recon: Reconstructions, ``[examples, d]``.
    """
    centered = x - jnp.mean(x, axis=0, keepdims=True)
    return 1 - jnp.sum(jnp.square(x - recon)) / jnp.sum(jnp.square(centered))


def cooccurrence(z: jax.Array) -> jax.Array:
    """Counts the examples in which two features are both above 0.

    Args:
      z: Codes, ``[examples, m]``.

    Returns:
      ``[m, m]`` float32, on its diagonal the examples of each feature; exact up to 2^24 examples.
    """
    active = (z > 0).astype(working_dtype(z))
    return gram(active, active)


def mean_wasserstein1(acts: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over features of the distance between their values on positive and on negative examples.

    The Wasserstein distance W1 in one dimension: the area between two distribution functions, exact for any numbers of
    examples (with as many of each, the mean of ``|sorted(positive) - sorted(negative)|``).  Features are sorted some
    hundred at a time.

    Args:
      acts: Features, ``[examples, m]`` floating point.
      labels: Which examples are positive, ``[examples]`` bool; of both kinds there has to be one, else the result is
        NaN.

    Returns:
      A scalar.

    Raises:
      ValueError: Shapes don't match.
    """
    if acts.ndim != 2 or labels.shape != acts.shape[:1]:
        raise ValueError(
            f"acts, labels: expected [examples, m] and [examples], got {list(acts.shape)} and {list(labels.shape)}"
        )
    positive = labels.astype(acts.dtype)
    shares = positive / jnp.sum(positive), (1 - positive) / jnp.sum(1 - positive)
    difference = shares[0] - shares[1]

    def distance(values):
        order = jnp.argsort(values)
        values, height = values[order], jnp.cumsum(difference[order])
        return jnp.sum(jnp.diff(values) * jnp.abs(height[:-1]))

    return jnp.mean(jax.lax.map(distance, acts.T, batch_size=_AT_A_TIME))


def sparse_probe_f1(
    acts: np.ndarray,
    labels: np.ndarray,
    *,
    ks: Sequence[int] = (1, 2, 5),
    train: int = 4000,
    test: int = 1000,
    seed: int = 0,
) -> dict[int, float]:
    """F1 of logistic probes on few features of a code, a mean over classes.

    Of each class, its examples and as many random others are divided into a training and a test part.  The K features
    with the largest absolute difference of their means are chosen on the training part, and a logistic regression with
    penalty ``||w||^2 / 2`` beside the summed loss (scikit-learn's C of 1) is fitted to them.  Solved by Newton's method
    on the host.

    Args:
      acts: Features, ``[examples, m]``.
      labels: Classes, ``[examples]`` integers.
      ks: Numbers of features.
      train: Most examples of a training part, of both kinds together.
      test: Most examples of a test part; with fewer examples both shrink alike.
      seed: Seed of the draws.

    Returns:
      K to mean F1.

    Raises:
      ValueError: Shapes don't match, a feature is not finite, there is one class only, or a class has too few examples.
    """
    if acts.ndim != 2 or labels.shape != acts.shape[:1]:
        raise ValueError(f"acts, labels: expected [examples, m] and [examples], got {acts.shape} and {labels.shape}")
    if not np.isfinite(acts).all():
        raise ValueError("acts: expected finite features, got NaN or infinity")
    if wrong := [k for k in ks if not 1 <= k <= acts.shape[1]]:
        raise ValueError(f"ks: expected 1 to {acts.shape[1]} features, got {wrong[0]}")
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"labels: expected two classes or more, got {len(classes)}")
    rng, found = np.random.default_rng(seed), {k: [] for k in ks}
    for c in classes:
        halves = [rng.permutation(np.flatnonzero(part)) for part in (labels == c, labels != c)]
        each = min(len(halves[0]), len(halves[1]), (train + test) // 2)
        held = max(1, round(each * test / (train + test)))
        if each < 2:
            raise ValueError(f"labels: expected two examples or more of a class and of all others, got {each} of {c}")
        rows = [np.concatenate([half[part] for half in halves]) for part in (slice(held, each), slice(held))]
        y = [np.repeat([True, False], len(r) // 2) for r in rows]
        gap = np.abs(acts[rows[0]][y[0]].mean(axis=0) - acts[rows[0]][~y[0]].mean(axis=0))
        ranked = np.argsort(-gap, kind="stable")
        for k in ks:
            x = [np.c_[acts[r][:, ranked[:k]].astype(np.float64), np.ones(len(r))] for r in rows]
            said = x[1] @ logistic_weights(x[0], y[0], l2=1 / len(y[0])) > 0
            hits = np.sum(said & y[1])
            found[k].append(2 * hits / max(np.sum(said) + np.sum(y[1]), 1))
    return {k: float(np.mean(values)) for k, values in found.items()}
