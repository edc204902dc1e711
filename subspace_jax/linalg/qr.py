"""QR with a positive diagonal: by Householder reflections, and by Cholesky where the columns are nearly orthonormal."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg.products import gram, times


def positive_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thin QR whose triangular factor has a non-negative diagonal, which makes it unique for full column rank.

    Args:
      x: ``[..., n, k]`` with ``n >= k``, float32 or float64.

    Returns:
      ``q [..., n, k]`` with orthonormal columns and ``r [..., k, k]``, upper triangular.

    Raises:
      ValueError: ``x`` is wider than tall.
    """
    check_tall("x", x)
    q, r = jnp.linalg.qr(x)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    signs = jnp.where(diagonal < 0, -1.0, 1.0).astype(x.dtype)
    return q * signs[..., None, :], signs[..., :, None] * r


def cholesky_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """QR by the Cholesky factor of the Gram matrix: two passes over ``x``, no Householder reflections.

    The loss of orthogonality is about the machine precision times the squared condition number: use it on what is
    nearly orthonormal already, and :func:`cholesky_qr2` otherwise.

    Args:
      x: ``[..., n, k]`` of full column rank, float32 or float64.

    Returns:
      ``q [..., n, k]`` and ``r [..., k, k]`` with a positive diagonal; NaN where the Gram matrix is not positive
      definite in floating point.

    Raises:
      ValueError: ``x`` is wider than tall.
    """
    check_tall("x", x)
    r = jnp.linalg.cholesky(gram(x, x)).mT
    eye = jnp.broadcast_to(jnp.eye(r.shape[-1], dtype=r.dtype), r.shape)
    inverse = jax.lax.linalg.triangular_solve(r, eye, left_side=True, lower=False)
    return times(x, inverse), r


def cholesky_qr2(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`cholesky_qr` twice: orthonormal to machine precision for condition numbers up to its inverse root.

    That is about 2e3 in float32 and 5e7 in float64 (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44, 2015).

    Args:
      x: ``[..., n, k]`` of full column rank, float32 or float64.

    Returns:
      ``q [..., n, k]`` and ``r [..., k, k]`` with a positive diagonal; NaN beyond that condition number.

    Raises:
      ValueError: ``x`` is wider than tall.
    """
    q, r = cholesky_qr(x)
    q, correction = cholesky_qr(q)
    return q, times(correction, r)


def check_tall(name: str, x: jax.Array) -> None:
    """Raises unless ``x`` is a stack of float32 or float64 matrices that are at least as tall as wide."""
    if x.ndim < 2 or x.shape[-1] > x.shape[-2]:
        raise ValueError(f"{name}: expected [..., n, k] with k <= n, got {x.shape}")
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
