"""The Stiefel logarithm in coordinates: a shooting iteration on ``k x k`` matrices.

With ``Y = S M + L``, ``S^T L = 0``, and ``H = S A + L F``, the geodesic from ``S`` rotates ``[S, L]`` by the
exponential of ``K = [[A, -F^T G], [F, 0]]``, ``G = L^T L``, and reaches ``Y`` if ``expm(K) [I; 0] = [M; I]``.  A change
of ``K`` by D changes ``expm(K)`` by ``U psi(D) U`` with ``U = expm(K / 2)`` and
``psi = sinh(ad / 2) / (ad / 2) = 1 + ad^2 / 24 + ad^4 / 1920 + ...``, ``ad(D) = K D - D K``.
"""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import expm, eye_like, times

# Corrections for the terms of psi beyond the identity; each raises the order of convergence by one.
_CORRECTIONS = 2


def log_parts(m: jax.Array, g: jax.Array, num_iters: int) -> tuple[jax.Array, jax.Array]:
    """Solves for the skew matrix ``A`` and the factor ``F``.

    Args:
      m: ``S^T Y``, ``[..., k, k]``.
      g: ``L^T L``, ``[..., k, k]``.
      num_iters: Iterations.

    Returns:
      ``A`` and ``F``, both ``[..., k, k]``; NaN if the iteration has not converged.
    """
    eye, k = eye_like(m), m.shape[-1]
    target = jnp.concatenate([m, eye], axis=-2)

    def lift(skew, factor):
        return jnp.block([[skew, -times(factor.mT, g)], [factor, jnp.zeros_like(skew)]])

    def improve(carry, _):
        skew, factor = carry
        whole = lift(skew, factor)
        half, back = expm(jnp.stack([whole, -whole]) / 2)
        column = half[..., :k]
        gap = times(back, target) - column
        inverse = jnp.linalg.inv(column[..., :k, :])
        weighted_lower = times(g, column[..., k:, :])

        def solve(right):
            factor = times(right[..., k:, :], inverse)
            skew = times(right[..., :k, :] + times(factor.mT, weighted_lower), inverse)
            return (skew - skew.mT) / 2, factor

        step = solve(gap)
        for _ in range(_CORRECTIONS):
            second = _commute_twice(whole, lift(*step))
            step = solve(gap - times(second / 24 + _commute_twice(whole, second) / 1920, column))
        # In the null space of G the gap has no counterpart in R^n, so it is weighted by G.
        error = jnp.sum(jnp.square(gap[..., :k, :]), axis=(-2, -1))
        error = error + jnp.sum(gap[..., k:, :] * times(g, gap[..., k:, :]), axis=(-2, -1))
        return (skew + step[0], factor + step[1]), error

    (skew, factor), errors = jax.lax.scan(improve, ((m - m.mT) / 2, eye), length=num_iters)
    converged = (errors[-1] <= jnp.finfo(m.dtype).eps)[..., None, None]
    return jnp.where(converged, skew, jnp.nan), jnp.where(converged, factor, jnp.nan)


def _commute_twice(k: jax.Array, d: jax.Array) -> jax.Array:
    once = times(k, d) - times(d, k)
    return times(k, once) - times(once, k)
