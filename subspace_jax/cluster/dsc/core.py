"""Losses, affinity, labels and stopping of deep subspace clustering (arXiv 2504.18179)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg


def reconstruction_loss(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """The sum of squared differences of images and what is decoded of them.

    Args:
      x: ``[n, height, width, channels]``.
      x_hat: The same shape.

    Returns:
      A scalar.

    Raises:
      ValueError: The shapes differ.
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x, x_hat: expected one shape, got {x.shape} and {x_hat.shape}")
    return jnp.sum(jnp.square(x_hat - x))


def distance_preserving_loss(layers: Sequence[jax.Array], mask: jax.Array | None = None) -> jax.Array:
    """The mean over layers of ``sum_ij H_ij (H_l)_ij``, with ``H_l`` the squared distances of examples in layer l.

    ``H`` is that of the input, the first layer.  The loss is small where examples that are far apart in the input come
    close in the layers; layers of constants have the least, so few steps are enough.

    Args:
      layers: The input and the output of every layer, ``[n, ...]`` each.
      mask: ``[n]``, 1 for examples and 0 for padding.

    Returns:
      A scalar.

    Raises:
      ValueError: There is no layer, or they differ in their numbers of examples.
    """
    layers = flattened(layers)
    distances = [linalg.pairwise_sq_distances(v, v) for v in layers]
    weights = distances[0] if mask is None else distances[0] * mask[:, None] * mask[None]
    return sum(jnp.sum(weights * d) for d in distances) / len(layers)


def self_expression_loss(coef: jax.Array, layers: Sequence[jax.Array], *, gram: bool = False) -> jax.Array:
    """``sum_l |V_l - C V_l|_F^2``: every layer is expressed by itself, by the same coefficients.

    Args:
      coef: ``C [n, n]``; row i has the coefficients of example i.
      layers: ``V_l [n, ...]``, the input among them as a rule.
      gram: Whether to compute ``tr((C - I) G (C - I)^T)`` from ``G = sum_l V_l V_l^T [n, n]``: for layers that are
        fixed and together wider than ``n``.  It is rounded by the squares of the layers, not by those of what is left.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: ``coef`` is not square, there is no layer, or the numbers of examples differ.
    """
    layers = flattened(layers)
    if coef.ndim != 2 or coef.shape != (layers[0].shape[0],) * 2:
        raise ValueError(f"coef: expected [n, n] for layers of {layers[0].shape[0]} examples, got {coef.shape}")
    v = jnp.concatenate([layer.astype(linalg.working_dtype(coef, layer)) for layer in layers], axis=1)
    if not gram:
        return jnp.sum(jnp.square(v - linalg.times(coef, v)))
    left = coef - jnp.eye(coef.shape[0], dtype=coef.dtype)
    return jnp.sum(linalg.times(left, linalg.times(v, v.T)) * left)


def subspace_structured_loss(coef: jax.Array, labels: jax.Array, eps: float = 1e-12) -> jax.Array:
    """``sum (|c_ij| + |c_ji|)^(1/2)`` over ordered pairs with different labels.

    A quasi-norm of the entries between clusters.  The gradient of pairs that are exactly 0 is 0.

    Args:
      coef: ``C [n, n]``.
      labels: ``[n]`` integers.
      eps: Added below the root.

    Returns:
      A scalar.

    Raises:
      ValueError: ``coef`` is not square, or there is not one label for each row.
    """
    if coef.ndim != 2 or coef.shape[0] != coef.shape[1] or labels.shape != coef.shape[:1]:
        raise ValueError(f"coef, labels: expected [n, n] and [n], got {coef.shape} and {labels.shape}")
    sizes = coef * jax.lax.stop_gradient(jnp.sign(coef))  # whose slope at 0 is 0
    sizes = sizes + sizes.T
    counts = (labels[:, None] != labels[None]) & (sizes > 0)
    # The root has an infinite slope at 0, which times a derivative of 0 is NaN.
    return jnp.sum(jnp.where(counts, jnp.sqrt(jnp.where(counts, sizes, 1.0) + eps), 0.0))


def column_affinity(coef: jax.Array, keep: int) -> jax.Array:
    """The affinity of coefficients: the ``keep`` largest of each column of ``(|C| + |C|^T) / 2``, made symmetric.

    Entries that equal the smallest that is kept are kept as well.

    Args:
      coef: ``C [n, n]``.
      keep: Entries of a column; prior knowledge, such as 9 for faces and objects under changing light and 12 for
        handwritten digits.

    Returns:
      ``[n, n]``, symmetric and not negative.

    Raises:
      ValueError: ``coef`` is not square, or ``keep`` is not between 1 and ``n``.
    """
    if coef.ndim != 2 or coef.shape[0] != coef.shape[1]:
        raise ValueError(f"coef: expected a square matrix [n, n], got {coef.shape}")
    if not 1 <= keep <= coef.shape[0]:
        raise ValueError(f"keep: expected 1 to {coef.shape[0]}, the number of examples, got {keep}")
    sizes = (jnp.abs(coef) + jnp.abs(coef).T) / 2
    least = jax.lax.top_k(sizes, keep)[0][:, -1]  # rows are columns
    kept = jnp.where(sizes >= least[None], sizes, 0)
    return (kept + kept.T) / 2


def spectral_labels(key: jax.Array, affinity: jax.Array, num_clusters: int) -> jax.Array:
    """Labels of a graph by normalized spectral clustering, clusters in the order of their first example.

    The eigenvectors are those of ``I + D^-1/2 A D^-1/2``, each row divided by its length, and k-means has 20 starts.
    Equal partitions so have equal labels.

    Args:
      key: Key of the starts.
      affinity: ``A [n, n]``, from :func:`column_affinity`.
      num_clusters: Clusters, static.

    Returns:
      ``[n]`` int32.

    Raises:
      ValueError: See :func:`subspace_jax.linalg.spectral_clustering`.
    """
    found = linalg.spectral_clustering(key, affinity, num_clusters).assignments
    n = found.shape[0]
    first = jnp.full(num_clusters, n, jnp.int32).at[found].min(jnp.arange(n, dtype=jnp.int32))
    return jnp.argsort(jnp.argsort(first)).astype(jnp.int32)[found]


def lsr_coefficients(x: jax.Array, ridge: float = 0.1) -> jax.Array:
    """The closed-form start: least-squares representation of the examples, each without itself.

    Pixels are scaled to unit length over the examples first.  As in the authors' code the coefficients of an example
    are a column.

    Args:
      x: ``[n, ...]``.
      ridge: Weight of the penalty.

    Returns:
      ``[n, n]`` with a diagonal of 0; float32 or wider.

    Raises:
      ValueError: ``ridge`` is not positive; see also :func:`subspace_jax.linalg.lsr`.
    """
    if not ridge > 0:
        raise ValueError(f"ridge: expected more than 0, got {ridge}")
    return linalg.lsr(linalg.unit_vectors(x.reshape(x.shape[0], -1).T).T, 1 / ridge).T


def code_on(points: jax.Array, examples: jax.Array, ridge: float) -> jax.Array:
    """The coefficients of new points on examples, by ridge regression: ``W V^T (V V^T + ridge I)^-1``.

    Args:
      points: ``W [m, p]``.
      examples: ``V [n, p]``.
      ridge: Weight of the penalty, above 0.

    Returns:
      ``[m, n]``.
    """
    scatter = linalg.gram(examples, examples) + ridge * jnp.eye(examples.shape[1], dtype=examples.dtype)
    return linalg.times(jax.scipy.linalg.solve(scatter, points.T, assume_a="pos").T, examples.T)


def relative_stop(
    tol: float, patience: int, metric: str = "loss", *, steps: bool = False
) -> Callable[[Sequence[Mapping[str, Any]]], bool]:
    """A rule for :attr:`subspace_jax.train.Phase.stop`: the loss has stopped changing.

    Args:
      tol: Relative change below which a round counts.
      patience: Rounds in a row that have to count.
      metric: What is watched.
      steps: Whether the metric is itself the relative change.

    Returns:
      ``stop(rows) -> bool`` of the rows of a phase.

    Raises:
      ValueError: ``tol`` is negative, or ``patience`` below 1.
    """
    if not tol >= 0 or patience < 1:
        raise ValueError(f"tol, patience: expected at least 0 and at least 1, got {tol} and {patience}")

    def stop(rows: Sequence[Mapping[str, Any]]) -> bool:
        values = np.asarray([row[metric] for row in rows if row["split"] == "train"], np.float64)
        changes = values if steps else np.abs(np.diff(values)) / np.maximum(values[:-1], np.finfo(np.float64).tiny)
        return len(changes) >= patience and bool(np.all(changes[-patience:] < tol))

    return stop


def flattened(layers: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns layers as rows ``[n, p_l]``; raises a ValueError where there is none, or their examples differ."""
    counts = {layer.shape[0] for layer in layers}
    if len(counts) != 1:
        raise ValueError(f"layers: expected layers [n, ...] of the same examples, got {[x.shape for x in layers]}")
    return [layer.reshape(layer.shape[0], -1) for layer in layers]


@functools.partial(jax.jit, static_argnames=("num_clusters", "keep"))
def coefficient_labels(key: jax.Array, coef: jax.Array, *, num_clusters: int, keep: int) -> jax.Array:
    """:func:`spectral_labels` of the :func:`column_affinity` of coefficients ``[n, n]``."""
    return spectral_labels(key, column_affinity(coef, keep), num_clusters)
