"""The orthonormal basis nearest to a matrix, by Newton-Schulz iteration."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_tall
from subspace_jax.linalg.products import eye_like, gram, times
from subspace_jax.linalg.qr import cholesky_qr2

_ITERATIONS = {4: 32, 8: 58}


def polar(x: jax.Array, num_iters: int | None = None) -> jax.Array:
    """Orthogonal polar factor ``x (x^T x)^{-1/2}``: the orthonormal matrix nearest to ``x``.

    Cholesky-QR2 takes a tall ``x`` to its ``k x k`` triangular factor, and the iteration ``r (3 I - r^T r) / 2`` runs
    there, so that ``x`` is read five times however many iterations there are.  The error is about the machine
    precision times the condition number, as the polar factor's own sensitivity has it (Higham, "Functions of
    Matrices", chapter 8).

    Args:
      x: ``[..., n, k]`` of full column rank, float32 or float64.
      num_iters: Iterations.  The smallest singular value grows 1.5-fold in each; the default, 32 in float32 and 58
        in float64, serves condition numbers up to 2e3 and 5e7, the range of :func:`cholesky_qr2`.

    Returns:
      ``[..., n, k]`` with orthonormal columns; NaN where the condition number is too large for that.

    Raises:
      ValueError: ``x`` is wider than tall, or ``num_iters`` is below 1.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_tall("x", x)
    num_iters = _ITERATIONS[x.dtype.itemsize] if num_iters is None else num_iters
    if num_iters < 1:
        raise ValueError(f"num_iters: expected at least 1, got {num_iters}")
    if x.shape[-2] == x.shape[-1]:
        return _newton_schulz(x, num_iters)
    q, r = cholesky_qr2(x)
    return times(q, _newton_schulz(r, num_iters))


def polar_step(s: jax.Array) -> jax.Array:
    """One Newton step towards the nearest orthonormal matrix, ``S (3 I - S^T S) / 2``.

    Squares the orthonormality error, up to a factor 3/4; use it where that is below about 0.1.

    Args:
      s: ``[..., n, k]``, float32 or float64.

    Returns:
      ``[..., n, k]``.

    Raises:
      ValueError: ``s`` is wider than tall.
      TypeError: ``s`` is neither float32 nor float64.
    """
    check_tall("s", s)
    g = gram(s, s)
    return times(s, 1.5 * eye_like(g) - 0.5 * g)


def _newton_schulz(x: jax.Array, num_iters: int) -> jax.Array:
    x = x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = jax.lax.fori_loop(0, num_iters, lambda _, x: polar_step(x), x)
    g = jax.lax.stop_gradient(gram(x, x))
    converged = jnp.linalg.norm(g - eye_like(g), axis=(-2, -1), keepdims=True) < 1e-3
    return jnp.where(converged, x, jnp.nan)
