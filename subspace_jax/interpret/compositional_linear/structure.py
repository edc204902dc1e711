"""The geometry of factors and probes: angles between concepts, ranks, the subspace that probes read."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.compositional_linear.checks import check_examples, check_weights
from subspace_jax.interpret.compositional_linear.core import Factors, centred, factors_of
from subspace_jax.linalg import times, working_dtype

KINDS = ("factor", "difference")
_SMALL = 1e-9
_SPAN_TOLERANCE = 1e-12
_ROUNDING = 16  # units of the last place of the largest singular value, up to which others are rounding
# Rows of a matrix of cosines at a time: a concept of n values has n (n - 1) / 2 differences.
_AT_A_TIME = 256


class FactorCosines(NamedTuple):
    """Mean absolute cosines between the vectors of concepts.

    Attributes:
      matrix: ``[concepts, concepts]``; on the diagonal the mean over pairs of different vectors of one concept.
      within: Mean over all pairs of one concept.
      across: Mean over all pairs of two concepts.
    """

    matrix: jax.Array
    within: jax.Array
    across: jax.Array


def factor_cosines(factors: Factors, kind: str = "factor") -> FactorCosines:
    """Mean absolute cosines within and across concepts; across is 0 where concepts are orthogonal.

    Values without examples are left out.  "factor" compares the factors, as arXiv 2602.24264 measures it; "difference"
    the differences ``u_a - u_b`` with ``a < b`` of each concept, of which its theorem speaks.  A concept of two values
    has one difference, with a cosine of 1 on the diagonal.  ``within`` and ``across`` weigh all pairs alike, not all
    concepts.

    Differences cost ``n^2 m^2 d / 4`` operations for two concepts of n and m values.

    Args:
      factors: The factors, of two concepts or more.
      kind: "factor" or "difference".

    Returns:
      The cosines; NaN where there are no pairs, as within a concept with examples of one value alone.

    Raises:
      ValueError: There are fewer than two concepts, or the kind is unknown.
    """
    if len(factors.means) < 2:
        raise ValueError(f"factors: expected those of 2 concepts or more, got {len(factors.means)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    return _cosines(factors, kind)


def effective_rank(factors: Factors, share: float = 0.95) -> jax.Array:
    """Directions that each concept needs: the least number of singular values with this share of their squares.

    Divide by ``n_values`` to compare concepts, as arXiv 2602.24264 does.

    Args:
      factors: The factors.
      share: Share of the sum of squares, above 0 and at most 1.

    Returns:
      ``[concepts]`` int32, at least 1.

    Raises:
      ValueError: The share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and at most 1, got {share}")
    return _ranks(factors, share)


@functools.partial(jax.jit, static_argnums=1)
def _ranks(factors, share):
    def rank(means):
        # Rows of values without examples are 0 and change no singular value.
        squares = jnp.square(jnp.linalg.svd(means, compute_uv=False))
        reached = jnp.cumsum(squares) >= share * jnp.sum(squares) * (1 - 4 * jnp.finfo(squares.dtype).eps)
        return jnp.argmax(reached) + 1

    return jnp.stack([rank(means) for means in factors.means]).astype(jnp.int32)


def probe_span(weights: Sequence[jax.Array], tol: float = 1e-6) -> jax.Array:
    """Orthonormal basis of the subspace that linear probes of all concepts read: the row space of their weights.

    Its width depends on the values, so that it does not work under ``jit``.

    Args:
      weights: For each concept ``[values, d]``, a row for each value.
      tol: Singular values of the stacked rows up to this, or up to their rounding, are null.

    Returns:
      ``[d, r]``; the projector is ``basis @ basis.T``.

    Raises:
      ValueError: The weights are no matrices of one width, not finite, or all null.
    """
    check_weights(weights)
    stacked = jnp.concatenate([jnp.asarray(w).astype(working_dtype(jnp.asarray(w))) for w in weights])
    _, sizes, vt = jnp.linalg.svd(stacked, full_matrices=False)
    least = max(tol, _ROUNDING * float(jnp.finfo(sizes.dtype).eps * sizes[0]))
    rank = int(np.sum(np.asarray(sizes) > least))
    if not rank:
        raise ValueError(f"weights: expected a singular value above {least}, got {float(sizes[0])} as the largest")
    return vt[:rank].T


def span_r2(x: jax.Array, labels: jax.Array, n_values: tuple[int, ...], weights: Sequence[jax.Array]) -> jax.Array:
    """Share of the variance in the row space of each concept's own probe that its own factors explain.

    Args:
      x: ``[examples, d]``, floating point.
      labels: ``[examples, concepts]`` integers.
      n_values: Number of values of each concept.
      weights: For each concept the weights of its probe, ``[values, d]``.

    Returns:
      ``[concepts]``; their mean is the score of arXiv 2602.24264.

    Raises:
      ValueError: As :func:`concept_factors`, or the weights do not fit.
      TypeError: As :func:`concept_factors`.
    """
    check_examples(x, labels, n_values)
    check_weights(weights, x.shape[1])
    if len(weights) != len(n_values):
        raise ValueError(f"weights: expected those of {len(n_values)} concepts, got {len(weights)}")
    return _span_r2(x, labels, tuple(n_values), tuple(weights))


@functools.partial(jax.jit, static_argnums=2)
def _span_r2(x, labels, n_values, weights):
    x, found = centred(x), []
    factors = factors_of(x, labels, n_values, "means")
    for i, (means, w) in enumerate(zip(factors.means, weights, strict=True)):
        _, sizes, vt = jnp.linalg.svd(w.astype(x.dtype), full_matrices=False)
        least = jnp.maximum(_SPAN_TOLERANCE, _ROUNDING * jnp.finfo(x.dtype).eps * sizes[0])
        basis = jnp.where(sizes[:, None] > least, vt, 0).T
        inside, predicted = times(x, basis), times(means, basis)[labels[:, i]]
        sst = jnp.sum(jnp.square(inside))
        found.append(1 - jnp.sum(jnp.square(inside - predicted)) / (sst + _SMALL))
    return jnp.stack(found)


def vectors_of(factors: Factors, kind: str) -> list[tuple[jax.Array, jax.Array]]:
    """For each concept unit vectors ``[m, d]``, zero for values without examples, and which of them count, ``[m]``."""
    found = []
    for means, counts in zip(factors.means, factors.counts, strict=True):
        vectors, active = means, counts > 0
        if kind == "difference":
            a, b = np.triu_indices(len(counts), 1)
            vectors, active = means[a] - means[b], active[a] & active[b]
        # Not the norm, whose gradient at 0 is NaN.
        squares = jnp.sum(jnp.square(vectors), axis=1, keepdims=True)
        lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        unit = vectors / (jnp.where(squares > 0, lengths, 0) + _SMALL)
        found.append((jnp.where(active[:, None], unit, 0), active))
    return found


@functools.partial(jax.jit, static_argnums=1)
def _cosines(factors, kind):
    vectors = vectors_of(factors, kind)
    dtype, k = factors.means[0].dtype, len(vectors)
    sums, pairs = ([[jnp.zeros((), dtype)] * k for _ in range(k)] for _ in range(2))
    for i, (own, active) in enumerate(vectors):
        count = jnp.sum(active).astype(dtype)
        for j, (others, others_active) in enumerate(vectors[i:], start=i):
            each = _sum_of_cosines(own, others, same=i == j)
            number = count * (count - 1 if i == j else jnp.sum(others_active).astype(dtype))
            sums[i][j] = sums[j][i] = each
            pairs[i][j] = pairs[j][i] = number
            if kind == "difference" and i == j:  # a single difference is compared with itself
                sums[i][i] = jnp.where(count == 1, 1, each)
                pairs[i][i] = jnp.where(count == 1, 1, number)
    sums, pairs = (jnp.asarray(x) for x in (sums, pairs))
    across = jnp.triu(jnp.ones((k, k), dtype), 1)
    return FactorCosines(
        sums / pairs,
        jnp.trace(sums) / jnp.trace(pairs),
        jnp.sum(across * sums) / jnp.sum(across * pairs),
    )


def _sum_of_cosines(one: jax.Array, two: jax.Array, *, same: bool) -> jax.Array:
    """Sum of absolute cosines over all pairs, but for a vector with itself where both are the ``same``."""
    if not len(one) or not len(two):
        return jnp.zeros((), one.dtype)

    def of_row(given):
        index, row = given
        cosines = jnp.abs(times(two, row[:, None])[:, 0])
        return jnp.sum(jnp.where(jnp.arange(len(two)) == index, 0, cosines) if same else cosines)

    rows = jax.lax.map(of_row, (jnp.arange(len(one)), one), batch_size=min(len(one), _AT_A_TIME))
    return jnp.sum(rows)
