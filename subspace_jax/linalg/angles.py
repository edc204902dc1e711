"""Angles and distances between subspaces."""

import functools

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_same_space
from subspace_jax.linalg.products import broadcast_leading, gram, nan_for_infinite, times, working_dtype
from subspace_jax.linalg.stacks import of_each

_triangular = functools.partial(jnp.linalg.qr, mode="r")
_singular_values = functools.partial(jnp.linalg.svd, compute_uv=False)


def principal_angles(a: jax.Array, b: jax.Array) -> jax.Array:
    """Principal angles between two subspaces, accurate for small ones and for those near a right angle.

    Cosines are the singular values of ``a^T b``, sines those of the part of the narrower basis that is orthogonal to
    the other (Bjoerck and Golub, Math. Comp. 27, 1973); their arctangent is accurate wherever one of them is.

    Args:
      a: Orthonormal basis ``[..., n, p]``.
      b: Orthonormal basis ``[..., n, q]``.

    Returns:
      ``[..., min(p, q)]`` in radians, ascending, at least float32.  Not differentiable where angles coincide or
      vanish.

    Raises:
      ValueError: The bases are not of the same space, or wider than tall.
      TypeError: They are not floating point.
    """
    check_same_space(a, b)
    dtype = working_dtype(a, b)
    a, b = broadcast_leading(a.astype(dtype), b.astype(dtype))
    if b.shape[-1] > a.shape[-1]:
        a, b = b, a
    overlap = gram(a, b)
    residual = b - times(a, overlap)
    residual = residual - times(a, gram(a, residual))
    cosines = of_each(_singular_values, nan_for_infinite(overlap))
    sines = of_each(_singular_values, of_each(_triangular, residual))[..., ::-1]
    return jnp.arctan2(sines, cosines)


def projector_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Frobenius distance of the two projectors, ``||a a^T - b b^T||``, without forming either.

    Args:
      a: Orthonormal basis ``[..., n, p]``.
      b: Orthonormal basis ``[..., n, q]``.

    Returns:
      ``[...]``, at least float32.  Not differentiable where principal angles coincide or vanish.

    Raises:
      ValueError: The bases are not of the same space, or wider than tall.
      TypeError: They are not floating point.
    """
    sines = jnp.sin(principal_angles(a, b))
    return jnp.sqrt(2 * jnp.sum(jnp.square(sines), axis=-1) + abs(a.shape[-1] - b.shape[-1]))
