"""One step on a Grassmann manifold and what is stored with it, through ``k x k`` matrices.

With ``H`` tangent at ``S``, the new basis and a vector that is carried along both are ``S X + H Y`` for ``k x k``
matrices X and Y.  Their inner products are known from ``S^T S`` and ``H^T H`` before either is made, so transports,
changes of basis and re-orthonormalisation compose in ``k x k``, and each array of size ``n x k`` is made once.  The
formulas are those of :mod:`subspace_jax.manifolds.grassmann`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.kernels.grassmann_step.gram import tall_gram
from subspace_jax.linalg import eye_like, times


def tangent_part(s: jax.Array, x: jax.Array) -> jax.Array:
    """``X - S (S^T X)``."""
    return x - _combine(s, tall_gram(s, x))


def move(
    s: jax.Array, direction: jax.Array, size: ArrayLike, due: jax.Array | None, transport: str, retraction: str
) -> tuple[jax.Array, jax.Array]:
    """Steps from ``s`` against the tangent part of a direction, and carries the direction along.

    Args:
      s: Bases ``[..., n, k]`` in the working dtype, orthonormal up to drift.
      direction: ``[..., n, k]``, not necessarily tangent.
      size: Step size, a scalar or ``[..., 1, 1]``.
      due: Whether to remove drift, boolean scalar; None for never.
      transport: What becomes of the direction: "euclidean" leaves it as it is, "project" takes its tangent part at
        ``s``, "parallel" carries that along the step.
      retraction: "exp", "qr", "polar" or "cayley".

    Returns:
      ``new - s``, and the direction in the basis ``new``.
    """
    overlap = tall_gram(s, direction)
    h = direction - _combine(s, overlap)
    square = tall_gram(h, h)
    x, y = _coefficients(size * size * square, retraction)
    y = -size * y

    # The Gram matrix of S X + H Y.  Bases keep what drift they have, or lose it where due, but a step adds nothing
    # beyond the rounding of products, whatever errors X and Y have.
    eye = eye_like(square)
    own = eye if due is None else jax.lax.cond(due, lambda s: tall_gram(s, s), lambda s: eye, s)
    cross = _inner(x, overlap - times(own, overlap), y)
    r = _inverse_factor(_inner(x, own, x) + _inner(y, square, y) + cross + cross.mT)
    x, y = times(x, r), times(y, r)
    # H is written out in terms of the direction, so that it need not be held till here: (X - I) - (S^T D) Y.
    left = jnp.concatenate([x - eye, -overlap], axis=-1)
    right = jnp.concatenate([eye, y], axis=-2)
    update = _combine(s, times(left, right)) + _combine(direction, y)

    # The qr retraction turns the basis within its subspace, and what is stored in the basis has to turn with it:
    # otherwise S and S Q, the same point, would part.  The other retractions don't turn it, nor does a removal of
    # drift by more than the drift.
    turn = linalg.polar(x) if retraction == "qr" else None
    if transport in ("euclidean", "project"):
        kept = direction if transport == "euclidean" else h
        return update, kept if turn is None else _combine(kept, turn)
    cos, sinc = linalg.cos_sinc_sqrt(size * size * square)
    along_s, along_h = times(size * sinc, square), cos
    if turn is not None:
        along_s, along_h = times(along_s, turn), times(along_h, turn)
    if retraction != "exp":
        # Transport went along the geodesic, which ends near the new point but not there: project to its tangent space.
        normal = _inner(x, own, along_s) + _inner(y, square, along_h)
        along_s, along_h = along_s - times(x, normal), along_h - times(y, normal)
    return update, _combine(s, along_s) + _combine(h, along_h)


def _coefficients(m: jax.Array, retraction: str) -> tuple[jax.Array, jax.Array]:
    """``X, Y`` such that ``S X + V Y`` is the retraction of ``V``, given ``M = V^T V``."""
    if retraction == "qr":
        r = _inverse_factor(eye_like(m) + m)
        return r, r
    if retraction == "polar":
        (root,) = linalg.spectral(lambda x: (jax.lax.rsqrt(1 + x),), m)
        return root, root
    if retraction == "cayley":
        return linalg.spectral(lambda x: ((1 - x / 4) / (1 + x / 4), 1 / (1 + x / 4)), m)
    return linalg.cos_sinc_sqrt(m)


def _combine(s: jax.Array, m: jax.Array) -> jax.Array:
    """``S m``, for few columns as a sum of columns times rows.

    Such sums fuse with what they are added to; a product would be written out and read again, which costs more than
    its arithmetic (measured on CPU up to 32 columns).  Let ``m`` be the result of a product: elementwise work on it
    would be fused too, and done again for every row of ``S``.
    """
    k = m.shape[-2]
    if k > 32:
        return times(s, m)
    return functools.reduce(jnp.add, (s[..., :, i : i + 1] * m[..., i : i + 1, :] for i in range(k)))


def _inner(x: jax.Array, metric: jax.Array, y: jax.Array) -> jax.Array:
    return times(x.mT, times(metric, y))


def _inverse_factor(g: jax.Array) -> jax.Array:
    """``R^{-1}`` for the upper Cholesky factor ``R`` of ``g``; the columns of ``A R^{-1}`` are orthonormal."""
    r = jnp.linalg.cholesky(g).mT
    return jax.lax.linalg.triangular_solve(r, eye_like(r), left_side=True, lower=False)
