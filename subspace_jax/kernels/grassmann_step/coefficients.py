"""A step on a Grassmann manifold in ``k x k`` matrices: from inner products to what is combined.

With ``H`` the tangent part of a direction D at ``S``, the new basis and a vector that is carried along both are
``S X + H Y`` for ``k x k`` matrices X and Y.  Their inner products are known from ``S^T S`` and ``H^T H`` before either
is made, so transports, changes of basis and re-orthonormalisation compose in ``k x k``, and each array of size ``n x
k`` is made once.  The formulas are those of :mod:`subspace_jax.manifolds.grassmann`.

Matrices near the identity are held as their difference from it: X is ``I + P``.  Small steps then lose a small part of
a rounding, and bases in float32 stay orthonormal to less than 1e-6 for any number of steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.linalg import eye_like, times

# Radians: beyond the first, bases are made orthonormal once more; a step ends after the second.
SHORT = 4.0
LONGEST = 64.0


class Algebra(NamedTuple):
    """Operations on square matrices, wherever an array has their axes.

    Attributes:
      times: Product of two.
      transposed: Transpose.
      eye_like: Identities.
      add_product: ``x + y z``, ready for use by every row of a basis.
      settled: A matrix itself, made ready for the same.
      inverse_factor: ``Q`` such that the columns of ``A (I + Q)`` are orthonormal, where ``A^T A = I + E`` and E is
      small. versine_sinc: See :func:`subspace_jax.linalg.versine_sinc_sqrt`.
    """

    times: Callable
    transposed: Callable
    eye_like: Callable
    add_product: Callable
    settled: Callable
    inverse_factor: Callable
    versine_sinc: Callable


class Combination(NamedTuple):
    """``S of_s + D of_d``; None for D itself."""

    of_s: jax.Array
    of_d: jax.Array


def combinations(
    overlap: jax.Array,
    square: jax.Array,
    drift: jax.Array,
    size: ArrayLike,
    transport: str,
    retraction: str,
    algebra: Algebra | None = None,
) -> tuple[Combination, Combination | None]:
    """Composes a step of length ``size`` against a direction D, and what becomes of D.

    Args:
      overlap: ``S^T D``, ``[..., k, k]``.
      square: ``H^T H`` for ``H = D - S (S^T D)``.
      drift: ``S^T S - I`` where it is to be removed, else zeros.
      size: Step size, a scalar or ``[..., 1, 1]``.
      transport: What becomes of the direction: "euclidean" leaves it as it is, "project" takes its tangent part at
        ``S``, "parallel" carries that along the step.
      retraction: "exp", "qr", "polar" or "cayley".
      algebra: How matrices are stored, their axes the last two by default; another one knows "exp" only.

    Returns:
      ``new - S``, and the direction in the basis ``new``; None where it stays as it is.
    """
    algebra = algebra or LAST_AXES
    times, transposed = algebra.times, algebra.transposed
    eye = algebra.eye_like(square)
    p, y = _coefficients(size * size * square, retraction, algebra)
    y = -size * y

    # S X + H Y has the Gram matrix I + excess.  Bases keep what drift they have, or lose it where due, but a step adds
    # next to nothing, whatever errors X and Y have.
    def inner(x, metric, y):
        return times(transposed(x), times(metric, y))

    def of_direction(of_s, of_h):
        """``S of_s + H of_h`` in terms of the direction, so that H need not be held."""
        return Combination(algebra.add_product(of_s, -overlap, of_h), algebra.settled(of_h))

    x = eye + p
    cross = -inner(x, times(drift, overlap), y)
    excess = p + transposed(p) + times(transposed(p), p) + inner(x, drift, x) + inner(y, square, y)
    q = algebra.inverse_factor(excess + cross + transposed(cross))
    p, y = p + q + times(p, q), times(y, eye + q)
    update = of_direction(p, y)

    # The qr retraction turns the basis within its subspace, and what is stored in the basis has to turn with it:
    # otherwise S and S Q, the same point, would part.  The other retractions don't turn it, nor does a removal of
    # drift by more than the drift.
    turn = linalg.polar(eye + p) if retraction == "qr" else None
    if transport == "euclidean":
        return update, None if turn is None else Combination(jnp.zeros_like(eye), turn)
    if transport == "project":
        return update, of_direction(jnp.zeros_like(eye), eye if turn is None else turn)
    versine, sinc = algebra.versine_sinc(size * size * square)
    along_s, along_h = times(size * sinc, square), eye - versine
    if turn is not None:
        along_s, along_h = times(along_s, turn), times(along_h, turn)
    if retraction != "exp":
        # Transport went along the geodesic, which ends near the new point but not there: project to its tangent space.
        x = eye + p
        normal = inner(x, eye + drift, along_s) + inner(y, square, along_h)
        along_s, along_h = along_s - times(x, normal), along_h - times(y, normal)
    return update, of_direction(along_s, along_h)


def _coefficients(m: jax.Array, retraction: str, algebra: Algebra) -> tuple[jax.Array, jax.Array]:
    """``P, Y`` such that ``S (I + P) + V Y`` is the retraction of ``V``, given ``M = V^T V``."""
    if retraction == "qr":
        q = _inverse_factor(m)
        return q, eye_like(m) + q
    if retraction == "polar":
        p, root = linalg.spectral(_polar_factor, m)
        return p, root
    if retraction == "cayley":
        return linalg.spectral(lambda x: (-x / 2 / (1 + x / 4), 1 / (1 + x / 4)), m)
    versine, sinc = algebra.versine_sinc(m)
    return -versine, sinc


def _polar_factor(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``1 / sqrt(1 + x) - 1``, precise where x is small, and ``1 / sqrt(1 + x)``."""
    root = jnp.sqrt(1 + x)
    return -x / (root * (1 + root)), 1 / root


def _inverse_factor(e: jax.Array) -> jax.Array:
    """``Q``, upper triangular, such that ``A (I + Q)`` has orthonormal columns where ``A^T A = I + E``."""
    eye = eye_like(e)
    r = jnp.linalg.cholesky(eye + e).mT
    q = jax.lax.linalg.triangular_solve(r, eye, left_side=True, lower=False) - eye
    # The factor carries a rounding of I.  What it leaves of the Gram matrix is known better than that, and taken off.
    left = e + q + q.mT + times(q.mT, q) + times(e, q) + times(q.mT, e) + times(q.mT, times(e, q))
    half = jnp.triu(left) - left * eye / 2
    return q - half - times(q, half)


# Matrices that rows of bases are multiplied by come out of products: elementwise work on them would be fused with that,
# and done again for every row.
LAST_AXES = Algebra(
    times=times,
    transposed=lambda x: x.mT,
    eye_like=eye_like,
    add_product=lambda x, y, z: times(jnp.concatenate([x, y], axis=-1), jnp.concatenate([eye_like(z), z], axis=-2)),
    settled=lambda x: times(eye_like(x), x),
    inverse_factor=_inverse_factor,
    versine_sinc=linalg.versine_sinc_sqrt,
)
# For steps that end after 64 radians.
BOUNDED = LAST_AXES._replace(versine_sinc=lambda m: linalg.versine_sinc_sqrt(m, True))
