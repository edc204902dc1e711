"""Sparse subspace clustering by the lasso and the elastic net (SSC, EnSC)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.linalg import SparseRows
from subspace_jax.linalg.expression_rows import block_of, checked, without_own

_INNER, _ROUNDS, _MAX_ROUNDS = 60, 40, 20
_PATIENCE = 3  # rounds without progress, after which rounding is all that is left


class ElasticNet(NamedTuple):
    """Coefficients of rows by elastic nets.

    Attributes:
      coefficients: ``[n, keep]``, those of largest magnitude.
      alpha: ``[n]``, weights of the penalties.
      violation: ``[n]``, by how much the optimality conditions of a row are violated at most.
    """

    coefficients: SparseRows
    alpha: jax.Array
    violation: jax.Array


def elastic_net_sc(
    x: jax.Array,
    gamma: float = 50.0,
    tau: float = 0.9,
    *,
    keep: int = 50,
    candidates: int = 100,
    tolerance: float | None = None,
    block_size: int | None = None,
) -> ElasticNet:
    """Represents each row by all others under an elastic net (You, Li, Robinson and Vidal, CVPR 2016).

    Row ``i`` minimizes ``tau |c|_1 + (1 - tau) / 2 |c|^2 + |x_i - c X|^2 / (2 alpha_i)`` with ``c_i = 0``; ``alpha_i``
    is ``max_j |<x_i, x_j>| / (tau gamma)``, a ``gamma``-th of the least that makes the solution zero.  The problem is
    solved for the rows of largest inner product first, by FISTA and a solution on the support that it finds; rows that
    violate the optimality conditions, ``|<x_j, (x_i - c X) / alpha>| <= tau``, join in.

    Args:
      x: ``[n, features]``, floating point; rows of unit length as a rule.
      gamma: Weight of the data, more than 1; 5 to 500 are usual.
      tau: Share of the 1-norm; 1 is SSC, 0.9 and 0.95 are usual for EnSC.
      keep: Entries of a row to keep.
      candidates: Rows among which a row is represented at a time.  No more can have a coefficient.
      tolerance: Of the optimality conditions; a row that violates them by less is done.  1e-3 in float32 and 1e-5 in
        float64 by default.
      block_size: Rows at a time.

    Returns:
      The coefficients; float32 or wider.  Look at ``violation`` where more than ``candidates`` rows may be needed.

    Raises:
      ValueError: ``x`` is no matrix or (where its values are known) not finite, or another argument is out of range.
      TypeError: ``x`` is not floating point.
    """
    x = checked(x)
    n = x.shape[0]
    if not gamma > 1:
        raise ValueError(f"gamma: expected more than 1, got {gamma}")
    if not 0 < tau <= 1:
        raise ValueError(f"tau: expected more than 0 and at most 1, got {tau}")
    if candidates < 1 or not 1 <= keep <= n:
        raise ValueError(f"keep, candidates: expected 1 to {n} and at least 1, got {keep} and {candidates}")
    candidates = min(candidates, n - 1)
    if tolerance is None:
        tolerance = 1e-3 if x.dtype == jnp.float32 else 1e-5

    def of_block(block):
        found = _of_rows(*block, x, gamma, tau, candidates, tolerance)
        top = linalg.top_entries(found.coefficients.val, min(keep, candidates))
        idx = jnp.take_along_axis(found.coefficients.idx, top.idx, axis=1)
        return found._replace(coefficients=SparseRows(idx, top.val))

    ids = jnp.arange(n, dtype=jnp.int32)
    numbers = 1 + candidates * (candidates + x.shape[1]) // n
    return ElasticNet(*linalg.map_row_blocks(of_block, (x, ids), block_of(n, block_size, numbers)))


def _of_rows(own, at, x, gamma, tau, candidates, tolerance):
    inner = without_own(jnp.abs(linalg.times(own, x.T)), at, -1.0)
    largest = jnp.max(inner, axis=1)
    # A row that is orthogonal to all others has the solution 0, whatever alpha.
    alpha = jnp.where(largest > 0, largest, 1) / (tau * gamma)
    idx = jax.lax.top_k(inner, candidates)[1].astype(jnp.int32)
    zeros, row = jnp.zeros(idx.shape, x.dtype), jnp.arange(own.shape[0])[:, None]

    def going(carry):
        _, _, violation, rounds = carry
        return jnp.any(violation > tolerance) & (rounds < _MAX_ROUNDS)

    def one(carry):
        idx, values, _, rounds = carry
        atoms = x[idx]
        values = _solve(own, atoms, alpha, values, tau, tolerance)
        delta = (own - _combined(values, atoms)) / alpha[:, None]
        scores = without_own(jnp.abs(linalg.times(delta, x.T)), at, -1.0)
        outside = scores.at[row, idx].set(-1.0)
        inside = _violation(own, atoms, alpha, values, tau)
        violation = jnp.maximum(jnp.max(outside, axis=1) - tau, inside)
        # The support stays; the others are those with the largest inner products.
        place = jnp.put_along_axis(
            scores,
            idx,
            jnp.where(values != 0, jnp.inf, jnp.take_along_axis(scores, idx, axis=1)),
            axis=1,
            inplace=False,
        )
        joined = jax.lax.top_k(place, candidates)[1].astype(jnp.int32)
        dense = jnp.zeros_like(scores).at[row, idx].set(values)
        again = violation > tolerance
        return (
            jnp.where(again[:, None], joined, idx),
            jnp.where(again[:, None], jnp.take_along_axis(dense, joined, axis=1), values),
            violation,
            rounds + 1,
        )

    start = (idx, zeros, jnp.full(own.shape[0], jnp.inf, x.dtype), jnp.int32(0))
    idx, values, violation, _ = jax.lax.while_loop(going, one, start)
    return ElasticNet(SparseRows(idx, values), alpha, violation)


def _combined(values, atoms):
    return jnp.einsum("bm,bmd->bd", values, atoms, precision=jax.lax.Precision.HIGHEST)


def _products(atoms, residual):
    return jnp.einsum("bmd,bd->bm", atoms, residual, precision=jax.lax.Precision.HIGHEST)


def _violation(own, atoms, alpha, values, tau):
    """By how much the optimality conditions of each row are violated among its atoms."""
    delta = _products(atoms, own - _combined(values, atoms)) / alpha[:, None]
    on = jnp.abs(delta - tau * jnp.sign(values) - (1 - tau) * values)
    return jnp.max(jnp.where(values != 0, on, jnp.abs(delta) - tau), axis=1)


def _solve(own, atoms, alpha, values, tau, tolerance):
    """Coefficients ``[b, m]`` of atoms ``[b, m, d]``: rounds of FISTA, each with a solution on its support."""
    gram = jnp.einsum("bmd,bkd->bmk", atoms, atoms, precision=jax.lax.Precision.HIGHEST)
    target = _products(atoms, own)
    ridge, sparse = alpha[:, None] * (1 - tau), alpha[:, None] * tau
    # The Frobenius norm is no less than the largest eigenvalue.
    step = 1 / (jnp.sqrt(jnp.sum(jnp.square(gram), axis=(1, 2)))[:, None] + ridge)

    def gradient(c):
        return jnp.einsum("bmk,bk->bm", gram, c, precision=jax.lax.Precision.HIGHEST) - target + ridge * c

    def fista(_, carry):
        c, ahead, momentum = carry
        moved = ahead - step * gradient(ahead)
        new = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - step * sparse, 0)
        # Momentum that points uphill starts anew (O'Donoghue and Candes 2015).
        uphill = jnp.sum((ahead - new) * (new - c), axis=1, keepdims=True) > 0
        momentum = jnp.where(uphill, 1, momentum)
        grown = (1 + jnp.sqrt(1 + 4 * jnp.square(momentum))) / 2
        return new, new + (momentum - 1) / grown * (new - c), grown

    def one(carry):
        c, ahead, momentum, best, error, stuck, rounds = carry
        before = error
        c, ahead, momentum = jax.lax.fori_loop(0, _INNER, fista, (c, ahead, momentum))
        for candidate in (c, _on_support(gram, target, ridge, sparse, c)):
            found = _violation(own, atoms, alpha, candidate, tau)
            best = jnp.where((found < error)[:, None], candidate, best)
            error = jnp.where(found < error, found, error)
        stuck = jnp.where(error < 0.9 * before, 0, stuck + 1)
        return c, ahead, momentum, best, error, stuck, rounds + 1

    def going(carry):
        _, _, _, _, error, stuck, rounds = carry
        return jnp.any((error > tolerance / 4) & (stuck < _PATIENCE)) & (rounds < _ROUNDS)

    error, stuck = jnp.full(own.shape[0], jnp.inf, own.dtype), jnp.zeros(own.shape[0], jnp.int32)
    start = (values, values, jnp.ones_like(step), values, error, stuck, jnp.int32(0))
    return jax.lax.while_loop(going, one, start)[3]


def _on_support(gram, target, ridge, sparse, c):
    """Solves the linear system of the support and signs of ``c``; 0 where it changes a sign."""
    on = c != 0
    system = jnp.where(on[:, :, None] & on[:, None, :], gram, 0)
    diagonal = jnp.where(on, ridge, 1)
    factor = jnp.linalg.cholesky(system + diagonal[:, :, None] * jnp.eye(c.shape[1], dtype=c.dtype)[None])
    right = jnp.where(on, target - sparse * jnp.sign(c), 0)[..., None]
    half = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
    found = jax.lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)[..., 0]
    return jnp.where(found * c > 0, found, 0)
