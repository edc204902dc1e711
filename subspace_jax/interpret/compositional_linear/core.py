"""Representations as sums of one vector per concept value: the vectors, and how much of the variance they explain.

Every function takes embeddings ``x [examples, d]`` and labels ``[examples, concepts]``, integers from 0, and centres
``x`` by its mean over the examples.  Sums are float32, or float64 for float64 embeddings.  Under ``jit`` with examples
that are sharded over devices, all sums over examples become sums over devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.compositional_linear.checks import check_examples, check_method, check_varies
from subspace_jax.linalg import gram, times, working_dtype


class Factors(NamedTuple):
    """A vector of each value of each concept.

    Attributes:
      means: For each concept the vectors of its values, ``[values, d]``, zero for a value without examples.
      counts: For each concept the examples of its values, ``[values]`` int32.
    """

    means: tuple[jax.Array, ...]
    counts: tuple[jax.Array, ...]


class FactorizationScore(NamedTuple):
    """How much of the variance a sum of factors explains.

    Attributes:
      r2: ``1 - sse / sst``: 1 where the sum is exact, below 0 where confounded factors are worse than the mean.
      sse: Sum of squared residuals.
      sst: Sum of squares about the mean.
    """

    r2: jax.Array
    sse: jax.Array
    sst: jax.Array


def concept_factors(x: jax.Array, labels: jax.Array, n_values: tuple[int, ...], method: str = "means") -> Factors:
    """Vectors of all concept values, whose sum approximates the centred embeddings.

    "means": the mean of the centred embeddings with each value (arXiv 2602.24264; Trager et al., arXiv 2302.14383),
    exact on a full balanced grid.  "lstsq": least squares on indicators of the values, exact on unbalanced sets too,
    where the means of two concepts that occur together are confounded; its vectors have a mean of 0 over the examples
    for each concept, as means have.

    Args:
      x: ``[examples, d]``, floating point.
      labels: ``[examples, concepts]`` integers.
      n_values: Number of values of each concept.
      method: "means" or "lstsq".

    Returns:
      The factors.

    Raises:
      ValueError: Shapes do not match, there are fewer than 2 examples, a label is negative or beyond ``n_values``,
        an embedding is not finite, or the method is unknown.
      TypeError: ``x`` is not floating point, or ``labels`` are not integers.
    """
    check_examples(x, labels, n_values)
    check_method(method)
    return _concept_factors(x, labels, tuple(n_values), method)


def reconstruct(factors: Factors, labels: jax.Array) -> jax.Array:
    """Sum of the factors of each example, an approximation of its centred embedding.

    Args:
      factors: The factors.
      labels: ``[examples, concepts]`` integers.

    Returns:
      ``[examples, d]``.

    Raises:
      ValueError: There are labels of another number of concepts.
    """
    if labels.ndim != 2 or labels.shape[1] != len(factors.means):
        raise ValueError(f"labels: expected [examples, {len(factors.means)}], got shape {list(labels.shape)}")
    return sum(means[labels[:, i]] for i, means in enumerate(factors.means))


def linear_factorization_r2(
    x: jax.Array,
    labels: jax.Array,
    n_values: tuple[int, ...],
    whiten: bool = True,
    projector: jax.Array | None = None,
    rcond: float = 1e-6,
    method: str = "means",
) -> FactorizationScore:
    """Share of the variance of embeddings that a sum of one vector per concept value explains.

    Whitened, every direction counts alike, and the score is the same after any invertible linear map.  The headline of
    arXiv 2602.24264 is the whitened score of what linear probes read: ``projector`` is then :func:`probe_span` of
    their weights.  Labels at random give about ``sum(n_values - 1) / (examples - 1)``.

    Whitening drops directions of small variance instead of dividing by it (a design choice: equal in exact arithmetic
    where they are null).  In float32 those below 2e-6 of the largest are rounding, and dropped whatever ``rcond`` is.

    Args:
      x: Other arguments: see :func:`concept_factors`.
      labels: See there.
      n_values: See there.
      whiten: Whether to whiten the embeddings.
      projector: A subspace to project to: an orthonormal basis ``[d, r]``, or the projector ``[d, d]``.
      rcond: Directions with less than this share of the largest variance are dropped when whitening.
      method: See there.

    Returns:
      The score; NaN under ``jit`` where the embeddings are constant.

    Raises:
      ValueError: As :func:`concept_factors`; or the embeddings are all the same, or the projector does not fit.
      TypeError: As :func:`concept_factors`.
    """
    check_examples(x, labels, n_values)
    check_method(method)
    check_varies(x)
    if projector is not None and (projector.ndim != 2 or projector.shape[0] != x.shape[1]):
        raise ValueError(f"projector: expected [{x.shape[1]}, r], got shape {list(projector.shape)}")
    return _score(x, labels, projector, rcond, tuple(n_values), whiten, method)


def whitening(scatter: jax.Array, rcond: float) -> jax.Array:
    """The map ``[d, r]`` that makes vectors white, by their covariance ``[d, d]``; a dropped direction gives zeros."""
    variances, directions = jnp.linalg.eigh(scatter)
    rounding = 16 * jnp.finfo(scatter.dtype).eps
    kept = variances > jnp.maximum(rcond, rounding).astype(scatter.dtype) * variances[-1]
    scales = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, variances, 1)), 0)
    return directions * scales[None]


def centred(x: jax.Array) -> jax.Array:
    """Embeddings less their mean, in the dtype of sums."""
    x = x.astype(working_dtype(x))
    return x - jnp.mean(x, axis=0, keepdims=True)


def factors_of(x: jax.Array, labels: jax.Array, n_values: tuple[int, ...], method: str) -> Factors:
    """The factors of centred embeddings, unchecked."""
    ones = jnp.ones(len(x), jnp.int32)
    counts = tuple(jax.ops.segment_sum(ones, labels[:, i], n) for i, n in enumerate(n_values))
    sums = tuple(jax.ops.segment_sum(x, labels[:, i], n) for i, n in enumerate(n_values))
    return solved(sums, counts, pair_counts(labels, n_values) if method == "lstsq" else None)


def solved(sums: tuple[jax.Array, ...], counts: tuple[jax.Array, ...], pairs: jax.Array | None) -> Factors:
    """Factors from the sums of centred embeddings over the examples of each value, ``[values, d]`` each.

    Args:
      sums: The sums.
      counts: Examples of each value.
      pairs: From :func:`pair_counts` for least squares; None for means.
    """
    dtype = sums[0].dtype
    if pairs is None:
        means = (s / jnp.maximum(c, 1).astype(dtype)[:, None] for s, c in zip(sums, counts, strict=True))
        return Factors(tuple(means), counts)
    # Singular: a constant may move from the vectors of one concept to those of another.
    joint = times(jnp.linalg.pinv(pairs.astype(dtype), hermitian=True), jnp.concatenate(sums))
    ends = np.cumsum([len(c) for c in counts])[:-1]
    means = []
    for own, c in zip(jnp.split(joint, ends), counts, strict=True):
        weights = c.astype(dtype) / jnp.sum(c).astype(dtype)
        means.append(jnp.where(c[:, None] > 0, own - times(weights[None], own), 0))
    return Factors(tuple(means), counts)


def pair_counts(labels: jax.Array, n_values: tuple[int, ...]) -> jax.Array:
    """How many examples have each pair of values, ``[values of all concepts, values of all concepts]`` int32."""
    ones = jnp.ones(len(labels), jnp.int32)
    blocks = []
    for i, n in enumerate(n_values):
        together = (labels[:, i] * m + labels[:, j] for j, m in enumerate(n_values))
        row = [jax.ops.segment_sum(ones, pair, n * m).reshape(n, m) for pair, m in zip(together, n_values, strict=True)]
        blocks.append(jnp.concatenate(row, axis=1))
    return jnp.concatenate(blocks)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _concept_factors(x, labels, n_values, method):
    return factors_of(centred(x), labels, n_values, method)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _score(x, labels, projector, rcond, n_values, whiten, method):
    x = centred(x)
    if projector is not None:
        x = times(x, projector.astype(x.dtype))
    residual = x - reconstruct(factors_of(x, labels, n_values, method), labels)
    if whiten:
        white = whitening(gram(x, x) / (len(x) - 1), rcond)
        x, residual = times(x, white), times(residual, white)
    sse, sst = jnp.sum(jnp.square(residual)), jnp.sum(jnp.square(x))
    return FactorizationScore(1 - sse / sst, sse, sst)
