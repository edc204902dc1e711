"""Orthogonal matrices from unconstrained ones, and matrices that are nearly orthogonal."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix, check_square
from subspace_jax.linalg.expm import expm
from subspace_jax.linalg.products import eye_like, times

_METHODS = ("expm", "cayley")


def orthogonal_from_skew(a: jax.Array, method: str = "expm") -> jax.Array:
    """Orthogonal matrices of determinant 1 from the skew-symmetric part ``S = A - A^T`` of any square matrices.

    Both maps take 0 to the identity and are differentiable.  "expm" reaches every rotation; "cayley", ``(I - S)
    (I + S)^{-1}``, those without an eigenvalue of -1, by one solve.

    Args:
      a: ``[..., k, k]``, float32 or float64.
      method: "expm" or "cayley".

    Returns:
      ``[..., k, k]``.

    Raises:
      ValueError: ``a`` is not square, or the method is unknown.
      TypeError: ``a`` is neither float32 nor float64.
    """
    check_square("a", a)
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {_METHODS}, got {method!r}")
    s = a - a.mT
    if method == "expm":
        return expm(s)
    # The factors commute.
    return jnp.linalg.solve(eye_like(s) + s, eye_like(s) - s)


def project_to_lambda_ball(w: jax.Array, lam: float) -> jax.Array:
    """Moves singular values towards 1 until ``||G - I||_F <= lam``, ``G`` the Gram matrix on the smaller side.

    Of all matrices with that bound and the singular vectors of ``w``, the result has the Gram matrix nearest to ``G``.
    It takes a singular value decomposition: for set-up and checks, not for a training step.

    Args:
      w: ``[..., n, m]``, float32 or float64.
      lam: Bound, at least 0.

    Returns:
      ``[..., n, m]``; ``w`` up to rounding where the bound holds already.

    Raises:
      ValueError: ``w`` is no matrix, or ``lam`` is negative.
      TypeError: ``w`` is neither float32 nor float64.
    """
    check_matrix("w", w)
    if not lam >= 0:
        raise ValueError(f"lam: expected a bound of at least 0, got {lam}")
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    excess = jnp.square(s) - 1
    norm = jnp.linalg.norm(excess, axis=-1, keepdims=True)
    kept = jnp.minimum(1.0, lam / jnp.maximum(norm, jnp.finfo(w.dtype).tiny))
    # At most 1 apart from 1 downwards, so the root is real.
    return times(u * jnp.sqrt(jnp.maximum(1 + kept * excess, 0))[..., None, :], vt)
