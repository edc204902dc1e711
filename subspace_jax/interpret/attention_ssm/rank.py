"""The dimension of the interaction operators that a sequence map uses."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg
from subspace_jax.interpret.attention_ssm._checks import (
    check_finite,
    check_heads,
    check_operators,
    check_tolerance,
)
from subspace_jax.interpret.attention_ssm.ssm import einsum


class Factors(NamedTuple):
    """A map in factored form, ``y_i = sum_h sum_j coef[h, i, j] values[h] x_j``.

    Attributes:
      coef: Coefficients, ``[heads, n, n]``; 0 where a token does not see another.
      values: Operators of the heads, ``[heads, p, d]``, which act on columns.
    """

    coef: jax.Array
    values: jax.Array


class RankReport(NamedTuple):
    """The dimension of the span of operators.

    A rank is a statement about a threshold: see the singular values before you rely on it.

    Attributes:
      k: Number of singular values above ``tol`` times the largest, int32.
      singular_values: Those of the matrix whose rows are the operators, descending.
      effective_rank: ``exp`` of the entropy of the shares ``s^2 / sum s^2``.
    """

    k: jax.Array
    singular_values: jax.Array
    effective_rank: jax.Array


def interaction_operator(fn: Callable[[jax.Array], Factors], x: jax.Array) -> jax.Array:
    """Returns ``W_ij = sum_h coef[h, i, j] values[h]`` of a map that is linear given its coefficients.

    Args:
      fn: Returns the factors of the map at tokens ``[n, d]``, such as ``FactorizedAttention(...).factors``.
      x: Tokens ``[n, d]``.

    Returns:
      ``[n, n, p, d]``: for the study of short sequences; :func:`factored_interaction_rank` needs none of it.

    Raises:
      ValueError: Shapes of the factors don't match.
    """
    factors = fn(x)
    _check_factors(factors)
    return einsum("hij,hpd->ijpd", *factors)


def effective_jacobian(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns ``dy_i / dx_j``, the interaction operators of any map to first order.

    Of a linear layer these are its operators; of attention they also have the paths through queries and keys.

    Args:
      fn: Maps tokens ``[n, d]`` to ``[n, p]``.
      x: Tokens ``[n, d]``.

    Returns:
      ``[n, n, p, d]``.
    """
    return jnp.moveaxis(jax.jacrev(fn)(x), 1, 2)


def interaction_rank(ops: jax.Array, tol: float | None = None) -> RankReport:
    """Returns the interaction rank: the dimension of the span of operators (arXiv 2512.15115).

    Args:
      ops: Operators ``[..., p, d]``, of pairs of tokens or of lags; ``m`` in all.
      tol: Relative threshold; ``10 max(m, p d) eps`` by default.

    Returns:
      The report, with ``min(m, p d)`` singular values.

    Raises:
      ValueError: These are no operators, they have NaN or infinite entries, or ``tol`` is not positive.
    """
    check_operators("ops", ops)
    check_tolerance(tol)
    flat = _flat(ops)
    # The singular values of a tall matrix are those of its triangle.
    small = jnp.linalg.qr(flat, mode="r") if flat.shape[0] > flat.shape[1] else flat
    return _report(small, 10 * max(flat.shape) * jnp.finfo(flat.dtype).eps if tol is None else tol)


def factored_interaction_rank(factors: Factors, tol: float | None = None) -> RankReport:
    """Returns the interaction rank of operators in factored form, without an array ``[m, p, d]``.

    The singular values are those that :func:`interaction_rank` finds for the operators of all pairs.

    Args:
      factors: Coefficients ``[heads, ...]`` of any number ``m`` of pairs, and operators ``[heads, p, d]``.
      tol: Relative threshold; ``10 sqrt(max(m, p d)) eps`` by default, as no entry of an operator is rounded.

    Returns:
      The report, with ``min(m, heads, p d)`` singular values.

    Raises:
      ValueError: Shapes don't match, entries are not finite, or ``tol`` is not positive.
    """
    _check_factors(factors, square=False)
    check_tolerance(tol)
    dtype = linalg.working_dtype(*factors)
    heads = factors.values.shape[0]
    pairs, entries = (jnp.reshape(x, (heads, -1)).astype(dtype).T for x in factors)
    left, right = (jnp.linalg.qr(x, mode="r") for x in (pairs, entries))
    largest = max(len(pairs), len(entries))
    default = 10 * float(np.sqrt(largest)) * jnp.finfo(dtype).eps
    return _report(linalg.times(left, right.T), default if tol is None else tol)


def truncated_heads_error(lags: jax.Array, k: int, *, pairs: bool = False) -> jax.Array:
    """Returns the relative Frobenius error of the best ``k`` heads for lag operators, over all coefficients.

    ``sqrt(sum_{r > k} s_r^2 / sum_r s_r^2)`` of the singular values of the lag matrix (Eckart, Young).

    Args:
      lags: Operators by lag, ``[n, p, d]``.
      k: Number of heads, 0 to ``min(n, p d)``.
      pairs: Whether a lag counts as often as there are pairs of tokens with it, instead of once.

    Raises:
      ValueError: ``lags`` are no operators or not finite, or ``k`` is out of range.
    """
    check_lags(lags)
    flat = _flat(lags)
    check_heads(k, min(flat.shape), least=0)
    if pairs:
        weights = np.sqrt(np.arange(len(flat), 0, -1))
        flat = flat * jnp.broadcast_to(jnp.asarray(weights, flat.dtype)[:, None], flat.shape)
    energy = jnp.square(jnp.linalg.svd(linalg.nan_for_infinite(flat), compute_uv=False))
    return jnp.sqrt(jnp.sum(energy[k:]) / jnp.sum(energy))


def check_lags(lags: jax.Array) -> None:
    """Raises a ValueError unless these are operators by lag, ``[n, p, d]``, and finite."""
    if lags.ndim != 3 or 0 in lags.shape:
        raise ValueError(f"lags: expected operators by lag [n, p, d], got shape {list(lags.shape)}")
    check_finite("lags", lags)


def _flat(ops: jax.Array) -> jax.Array:
    """Returns the matrix whose rows are the operators, in at least float32."""
    return jnp.reshape(ops, (-1, ops.shape[-2] * ops.shape[-1])).astype(linalg.working_dtype(ops))


def _report(matrix: jax.Array, tol: float) -> RankReport:
    values = jnp.linalg.svd(linalg.nan_for_infinite(matrix), compute_uv=False)
    k = jnp.sum(values > tol * values[0], dtype=jnp.int32)
    energy = jnp.square(values / jnp.where(values[0] > 0, values[0], 1))
    share = energy / jnp.maximum(jnp.sum(energy), jnp.finfo(energy.dtype).tiny)
    return RankReport(k, values, jnp.where(values[0] > 0, jnp.exp(jnp.sum(jax.scipy.special.entr(share))), 0))


def _check_factors(factors: Factors, square: bool = True) -> None:
    coef, values = factors
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"values: expected the operators of heads [heads, p, d], got shape {list(values.shape)}")
    fits = coef.ndim == 3 and coef.shape[1] == coef.shape[2] if square else coef.ndim > 1
    if not fits or 0 in coef.shape or coef.shape[0] != values.shape[0]:
        expected = "[heads, n, n]" if square else "[heads, ...]"
        raise ValueError(f"coef: expected {expected} of {values.shape[0]} heads, got shape {list(coef.shape)}")
    for name, x in factors._asdict().items():
        check_finite(name, x)
