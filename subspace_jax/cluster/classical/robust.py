"""Low-rank representation of rows of which some are wrong altogether (LRR with the l21 norm)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.linalg import SparseRows
from subspace_jax.linalg.expression_rows import checked, from_blocks

_START, _GROWTH, _LARGEST = 1e-2, 1.1, 1e10
_MAX_STEPS = 500


class RobustLowRank(NamedTuple):
    """A low-rank representation and what it leaves.

    Attributes:
      coefficients: ``[n, n]``, or :class:`SparseRows`.
      errors: ``[n, features]``, the rows less their representation; rows of zeros but for what is wrong.
      steps: ``[]`` int32, steps of the solver, at most 500.
    """

    coefficients: jax.Array | SparseRows
    errors: jax.Array
    steps: jax.Array


def lrr_l21(
    x: jax.Array,
    gamma: float = 4.0,
    *,
    keep: int | None = None,
    tolerance: float | None = None,
    block_size: int | None = None,
) -> RobustLowRank:
    """Low-rank representation with errors in few rows (Liu et al., PAMI 2013, equation 7).

    Minimizes ``|C|_* + lambda sum_i |e_i|`` with ``X = C X + E``, by the inexact augmented Lagrangian method.  ``C``
    is ``W U^T`` with the left singular vectors of ``x``, so that a step costs ``n features r`` operations and an SVD
    ``[n, r]``, ``r = min(n, features)``.

    Args:
      x: ``[n, features]``, floating point; rows of unit length as a rule.
      gamma: ``lambda`` over the largest weight with which all of ``x`` is error; more than 1.  The larger it is, the
        fewer rows have an error.
      keep: Entries of each row of coefficients to keep, those of largest magnitude; None for all.
      tolerance: The largest entry of what the constraints leave; 1e-5 in float32 and 1e-8 in float64 by default.
      block_size: Rows of coefficients at a time.

    Returns:
      Coefficients and errors; float32 or wider.

    Raises:
      ValueError: ``x`` is no matrix or (where its values are known) not finite, or another argument is out of range.
      TypeError: ``x`` is not floating point.
    """
    x = checked(x)
    if not gamma > 1:
        raise ValueError(f"gamma: expected more than 1, got {gamma}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected more than 0, got {tolerance}")
    u, s, vt = jnp.linalg.svd(linalg.nan_for_infinite(x), full_matrices=False)
    # With C = 0 the multipliers are the directions of the rows, whose products with the rows have norm 1 / lambda.
    norm = jnp.linalg.norm(linalg.times(linalg.unit_vectors(x).T, x), 2)
    penalty = gamma / jnp.where(norm > 0, norm, 1)
    if tolerance is None:
        tolerance = 1e-5 if x.dtype == jnp.float32 else 1e-8
    weights, errors, steps = _solve(x, s[:, None] * vt, s, penalty, tolerance)
    transposed = u.T
    coefficients = from_blocks(lambda own, at: linalg.times(own, transposed), weights, keep, block_size)
    return RobustLowRank(coefficients, errors, steps)


def _solve(x, basis, s, penalty, tolerance):
    """``W [n, r]`` and ``E`` of ``X = W basis + E``; ``basis basis^T`` is ``diag(s^2)``."""
    n, r = x.shape[0], basis.shape[0]

    def step(carry):
        weights, errors, of_data, of_copy, scale, _, steps = carry
        low = _low_rank(weights + of_copy / scale, 1 / scale)
        right = linalg.times(x - errors + of_data / scale, basis.T) + low - of_copy / scale
        weights = right / (jnp.square(s) + 1)[None]
        left = x - linalg.times(weights, basis)
        errors = _shrunk(left + of_data / scale, penalty / scale)
        gap, difference = left - errors, weights - low
        largest = jnp.maximum(jnp.max(jnp.abs(gap)), jnp.max(jnp.abs(difference)))
        of_data, of_copy = of_data + scale * gap, of_copy + scale * difference
        return weights, errors, of_data, of_copy, jnp.minimum(scale * _GROWTH, _LARGEST), largest, steps + 1

    def going(carry):
        return (carry[5] > tolerance) & (carry[6] < _MAX_STEPS)

    zeros, small = jnp.zeros_like(x), jnp.zeros((n, r), x.dtype)
    start = (small, zeros, zeros, small, jnp.asarray(_START, x.dtype), jnp.asarray(jnp.inf, x.dtype), jnp.int32(0))
    weights, errors, *_, steps = jax.lax.while_loop(going, step, start)
    return weights, errors, steps


def _low_rank(m, threshold):
    """Reduces the singular values of a matrix by ``threshold``, to no less than 0."""
    u, s, vt = jnp.linalg.svd(linalg.nan_for_infinite(m), full_matrices=False)
    return linalg.times(u * jnp.maximum(s - threshold, 0)[None], vt)


def _shrunk(rows, threshold):
    """Reduces the lengths of rows by ``threshold``, to no less than 0."""
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows * jnp.where(length > threshold, 1 - threshold / jnp.where(length > 0, length, 1), 0)
