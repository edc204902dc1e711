"""QR with a positive diagonal: by Householder reflections, and by Cholesky factors of the Gram matrix."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_tall
from subspace_jax.linalg.products import eye_like, gram, times
from subspace_jax.linalg.stacks import of_each

# A first pass that leaves more than this makes a second one lose digits, and is no longer to be trusted.
_FIRST_PASS_LIMIT = 0.9


def positive_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thin QR whose triangular factor has a non-negative diagonal, which makes it unique for full column rank.

    Args:
      x: ``[..., n, k]`` with ``n >= k``, float32 or float64.

    Returns:
      ``q [..., n, k]`` with orthonormal columns and ``r [..., k, k]``, upper triangular.

    Raises:
      ValueError: ``x`` is wider than tall.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_tall("x", x)
    q, r = of_each(jnp.linalg.qr, x)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    signs = jnp.where(diagonal < 0, -1.0, 1.0).astype(x.dtype)
    return q * signs[..., None, :], signs[..., :, None] * r


def cholesky_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """QR by the Cholesky factor of the Gram matrix: two passes over ``x``, no Householder reflections.

    The loss of orthogonality is about the machine precision times the squared condition number, and nothing tells of
    it: use it on what is nearly orthonormal already, and :func:`cholesky_qr2` otherwise.

    Args:
      x: ``[..., n, k]`` of full column rank, float32 or float64.

    Returns:
      ``q [..., n, k]`` and ``r [..., k, k]`` with a positive diagonal; NaN where the Gram matrix is not positive
      definite in floating point.

    Raises:
      ValueError: ``x`` is wider than tall.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_tall("x", x)
    return _divide(x, gram(x, x))


def cholesky_qr2(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """:func:`cholesky_qr` twice: orthonormal to machine precision for condition numbers up to its inverse root.

    That is about 2e3 in float32 and 5e7 in float64 (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44, 2015).  The
    second pass sees what the first one left, so beyond that range the result is NaN and never a bad basis.

    Args:
      x: ``[..., n, k]`` of full column rank, float32 or float64.

    Returns:
      ``q [..., n, k]`` and ``r [..., k, k]`` with a positive diagonal; NaN where the condition number is too large.

    Raises:
      ValueError: ``x`` is wider than tall.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_tall("x", x)
    q, r = _divide(x, gram(x, x))
    left = gram(q, q)
    error = jnp.linalg.norm(jax.lax.stop_gradient(left) - eye_like(left), axis=(-2, -1), keepdims=True)
    q, correction = _divide(q, jnp.where(error <= _FIRST_PASS_LIMIT, left, jnp.nan))
    return q, times(correction, r)


def shifted_cholesky_qr3(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """QR by three Cholesky passes, the first shifted: for ill-conditioned ``x`` where Householder QR is too slow.

    The shift makes the first factor exist whatever the condition number; what it leaves is mild enough for
    :func:`cholesky_qr2` up to condition numbers of about ``1 / (4 k eps)``: 3e5 in float32 and 1e14 in float64 for
    k = 8 (Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, arXiv 1809.11085, with a smaller shift than their
    worst-case bound asks for).

    Args:
      x: ``[..., n, k]`` of full column rank, float32 or float64.

    Returns:
      ``q [..., n, k]`` and ``r [..., k, k]`` with a positive diagonal; NaN where the condition number is too large.

    Raises:
      ValueError: ``x`` is wider than tall.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_tall("x", x)
    g = gram(x, x)
    trace = jnp.trace(g, axis1=-2, axis2=-1)[..., None, None]
    q, first = _divide(x, g + 2 * x.shape[-1] * jnp.finfo(x.dtype).eps * trace * eye_like(g))
    q, r = cholesky_qr2(q)
    return q, times(r, first)


def _divide(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``x r^{-1}`` and ``r``, the upper Cholesky factor of ``g``."""
    r = jnp.linalg.cholesky(g).mT
    inverse = jax.lax.linalg.triangular_solve(r, eye_like(r), left_side=True, lower=False)
    return times(x, inverse), r
