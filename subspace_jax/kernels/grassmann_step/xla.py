"""One step on a Grassmann manifold and what is stored with it, through ``k x k`` matrices.

With ``H`` tangent at ``S``, the new basis and a vector that is carried along both are ``S X + H Y`` for ``k x k``
matrices X and Y.  Their inner products are known from ``S^T S`` and ``H^T H`` before either is made, so transports,
changes of basis and re-orthonormalisation compose in ``k x k``, and each array of size ``n x k`` is made once.  The
formulas are those of :mod:`subspace_jax.manifolds.grassmann`.

Matrices near the identity are held as their difference from it: X is ``I + P``.  Small steps then lose a small part of
a rounding, and bases in float32 stay orthonormal to less than 1e-6 for any number of steps.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.kernels.grassmann_step.gram import defect, tall_gram
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
    p, y = _coefficients(size * size * square, retraction)
    y = -size * y

    # S X + H Y has the Gram matrix I + excess.  Bases keep what drift they have, or lose it where due, but a step adds
    # next to nothing, whatever errors X and Y have.
    eye = eye_like(square)
    drift = jnp.zeros_like(eye) if due is None else jax.lax.cond(due, defect, lambda s: jnp.zeros_like(eye), s)
    x = eye + p
    cross = -_inner(x, times(drift, overlap), y)
    excess = p + p.mT + times(p.mT, p) + _inner(x, drift, x) + _inner(y, square, y) + cross + cross.mT
    q = _inverse_factor(excess)
    p, y = p + q + times(p, q), times(y, eye + q)
    # H is written out in terms of the direction, so that it need not be held till here: (X - I) - (S^T D) Y.
    left = jnp.concatenate([p, -overlap], axis=-1)
    right = jnp.concatenate([eye, y], axis=-2)
    update = _combine(s, times(left, right)) + _combine(direction, y)

    # The qr retraction turns the basis within its subspace, and what is stored in the basis has to turn with it:
    # otherwise S and S Q, the same point, would part.  The other retractions don't turn it, nor does a removal of
    # drift by more than the drift.
    turn = linalg.polar(eye + p) if retraction == "qr" else None
    if transport in ("euclidean", "project"):
        kept = direction if transport == "euclidean" else h
        return update, kept if turn is None else _combine(kept, turn)
    versine, sinc = linalg.versine_sinc_sqrt(size * size * square)
    along_s, along_h = times(size * sinc, square), eye - versine
    if turn is not None:
        along_s, along_h = times(along_s, turn), times(along_h, turn)
    if retraction != "exp":
        # Transport went along the geodesic, which ends near the new point but not there: project to its tangent space.
        x = eye + p
        normal = _inner(x, eye + drift, along_s) + _inner(y, square, along_h)
        along_s, along_h = along_s - times(x, normal), along_h - times(y, normal)
    return update, _combine(s, along_s) + _combine(h, along_h)


def _coefficients(m: jax.Array, retraction: str) -> tuple[jax.Array, jax.Array]:
    """``P, Y`` such that ``S (I + P) + V Y`` is the retraction of ``V``, given ``M = V^T V``."""
    if retraction == "qr":
        q = _inverse_factor(m)
        return q, eye_like(m) + q
    if retraction == "polar":
        p, root = linalg.spectral(_polar_factor, m)
        return p, root
    if retraction == "cayley":
        return linalg.spectral(lambda x: (-x / 2 / (1 + x / 4), 1 / (1 + x / 4)), m)
    versine, sinc = linalg.versine_sinc_sqrt(m)
    return -versine, sinc


def _polar_factor(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``1 / sqrt(1 + x) - 1``, precise where x is small, and ``1 / sqrt(1 + x)``."""
    root = jnp.sqrt(1 + x)
    return -x / (root * (1 + root)), 1 / root


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


def _inverse_factor(e: jax.Array) -> jax.Array:
    """``Q``, upper triangular, such that ``A (I + Q)`` has orthonormal columns where ``A^T A = I + E``."""
    eye = eye_like(e)
    r = jnp.linalg.cholesky(eye + e).mT
    q = jax.lax.linalg.triangular_solve(r, eye, left_side=True, lower=False) - eye
    # The factor carries a rounding of I.  What it leaves of the Gram matrix is known better than that, and taken off.
    left = e + q + q.mT + times(q.mT, q) + times(e, q) + times(q.mT, e) + _inner(q, e, q)
    half = jnp.triu(left) - left * eye / 2
    return q - half - times(q, half)
