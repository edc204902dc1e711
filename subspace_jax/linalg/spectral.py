"""Functions of symmetric matrices through one small eigenproblem, with a safe first derivative.

Geodesics and retractions of ``n x k`` bases are smooth functions of a ``k x k`` Gram matrix; written so, they need no
singular value decomposition, and repeated or vanishing singular values are no special case.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_square
from subspace_jax.linalg.polar import polar_step
from subspace_jax.linalg.products import nan_for_infinite, times
from subspace_jax.linalg.stacks import of_each

_SERIES_BELOW = 0.01


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def spectral(f: Callable[[jax.Array], tuple[jax.Array, ...]], m: jax.Array) -> tuple[jax.Array, ...]:
    """Applies scalar functions to the eigenvalues of a symmetric matrix.

    The derivative is that of Daleckii and Krein, by divided differences, valid for equal eigenvalues.  It is
    differentiable once; a second derivative passes through the eigenvectors, and is wrong for equal eigenvalues.

    Args:
      f: Maps eigenvalues ``[..., k]`` to a tuple of arrays ``[..., k]``, elementwise and differentiable.
      m: ``[..., k, k]``, symmetric, float32 or float64.

    Returns:
      A symmetric matrix ``[..., k, k]`` per function.

    Raises:
      ValueError: ``m`` is not square.
      TypeError: ``m`` is neither float32 nor float64.
    """
    check_square("m", m)
    values, vectors = _eigh(m)
    return tuple(_compose(vectors, y) for y in f(values))


def _eigh(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = of_each(jnp.linalg.eigh, m)
    # Eigenvectors are orthonormal to tens of roundings only, which geodesics would pass on to the bases.
    return values, polar_step(vectors)


def _compose(vectors: jax.Array, values: jax.Array) -> jax.Array:
    return times(vectors * values[..., None, :], vectors.mT)


@spectral.defjvp
def _spectral_jvp(f, primals, tangents):
    (m,), (dm,) = primals, tangents
    values, vectors = _eigh(m)
    inner = times(vectors.mT, times(dm, vectors))
    a, b = jnp.broadcast_arrays(values[..., :, None], values[..., None, :])
    outs, tangents_out = [], []
    for i, y in enumerate(f(values)):
        outs.append(_compose(vectors, y))
        slopes = _divided_difference(lambda x, i=i: f(x)[i], a, b, y[..., :, None] - y[..., None, :])
        tangents_out.append(times(vectors, times(slopes * inner, vectors.mT)))
    return tuple(outs), tuple(tangents_out)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def singular(f: Callable[[jax.Array], jax.Array], m: jax.Array) -> jax.Array:
    """Applies a scalar function to the singular values of a square matrix: ``U f(s) V^T`` for ``M = U diag(s) V^T``.

    Small singular values keep their digits, half of which a function of ``M^T M`` would lose.  If ``f(0)`` is not 0,
    the function is discontinuous at singular matrices.  The derivative is by divided differences of ``f``, continued as
    an odd function, valid for equal singular values; it is differentiable once, and finite at singular matrices too.

    Args:
      f: Maps singular values ``[..., k]`` to an array ``[..., k]``, elementwise and differentiable.
      m: ``[..., k, k]``, float32 or float64.

    Returns:
      ``[..., k, k]``.

    Raises:
      ValueError: ``m`` is not square.
      TypeError: ``m`` is neither float32 nor float64.
    """
    check_square("m", m)
    u, values, v = _svd(m)
    return times(u * f(values)[..., None, :], v.mT)


def _svd(m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, values, vt = of_each(jnp.linalg.svd, nan_for_infinite(m))
    return polar_step(u), values, polar_step(vt.mT)


@singular.defjvp
def _singular_jvp(f, primals, tangents):
    (m,), (dm,) = primals, tangents
    u, values, v = _svd(m)
    inner = times(u.mT, times(dm, v))
    of_values = f(values)
    a, b = jnp.broadcast_arrays(values[..., :, None], values[..., None, :])
    slopes = _divided_difference(f, a, b, of_values[..., :, None] - of_values[..., None, :])
    total = of_values[..., :, None] + of_values[..., None, :]
    sums = total / jnp.maximum(a + b, jnp.finfo(m.dtype).eps)
    tangents_out = (slopes * (inner + inner.mT) + sums * (inner - inner.mT)) / 2
    return times(u * of_values[..., None, :], v.mT), times(u, times(tangents_out, v.mT))


def _divided_difference(f: Callable, a: jax.Array, b: jax.Array, difference: jax.Array) -> jax.Array:
    """Returns ``(f(a) - f(b)) / (a - b)``, or the slope if the two are near."""
    # Below this distance the rounding error of the quotient exceeds the error of the slope at the midpoint.
    near = jnp.abs(a - b) <= jnp.finfo(a.dtype).eps ** (1 / 3) * (1 + jnp.abs(a))
    middle = (a + b) / 2
    slope = jax.jvp(f, (middle,), (jnp.ones_like(middle),))[1]
    return jnp.where(near, slope, difference / jnp.where(near, 1.0, a - b))


def cos_sqrt(x: jax.Array) -> jax.Array:
    """Returns ``cos(sqrt(x))``, smooth also at 0 and slightly below."""
    root, small = _root(x)
    return jnp.where(small, 1 - x / 2 * (1 - x / 12 * (1 - x / 30 * (1 - x / 56))), jnp.cos(root))


def sinc_sqrt(x: jax.Array) -> jax.Array:
    """Returns ``sin(sqrt(x)) / sqrt(x)``, smooth also at 0 and slightly below."""
    root, small = _root(x)
    return jnp.where(small, 1 - x / 6 * (1 - x / 20 * (1 - x / 42 * (1 - x / 72))), jnp.sin(root) / root)


def versine_sqrt(x: jax.Array) -> jax.Array:
    """Returns ``(1 - cos(sqrt(x))) / x``, smooth also at 0 and slightly below."""
    half = sinc_sqrt(x / 4)
    return half * half / 2


def arcsine_ratio(x: jax.Array) -> jax.Array:
    """Returns ``arcsin(sqrt(x)) / sqrt(x (1 - x))``, smooth at 0; unbounded towards 1."""
    small = x < _SERIES_BELOW
    safe = jnp.clip(jnp.where(small, 0.5, x), 0.0, 1 - jnp.finfo(x.dtype).eps)
    exact = jnp.arcsin(jnp.sqrt(safe)) / jnp.sqrt(safe * (1 - safe))
    series = jnp.ones_like(x)
    for n in range(8, 0, -1):
        series = 1 + series * x * (2 * n / (2 * n + 1))
    return jnp.where(small, series, exact)


def _root(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    small = x < _SERIES_BELOW
    return jnp.sqrt(jnp.where(small, 1.0, x)), small
