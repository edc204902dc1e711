"""A step on a Grassmann manifold in ``k x k`` matrices, from inner products to the coefficients of a combination.

With ``H`` the tangent part of a direction D at ``S``, the new basis and a transported vector are both ``S X + H Y`` for
``k x k`` matrices X and Y.  Their inner products follow from ``S^T S`` and ``H^T H``, so that transports, changes of
basis and re-orthonormalization compose in ``k x k``, and each ``n x k`` array is computed once.  The formulas are those
of :mod:`subspace_jax.manifolds.grassmann`.

Matrices near the identity are stored as their difference from it: X is ``I + P``.  Small steps then lose a small part
of a rounding, and bases in float32 stay orthonormal to less than 1e-6 for any number of steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.linalg import eye_like, times

# Radians: longer steps than the first are followed by Newton steps; a step ends after the second.
SHORT = 4.0
LONGEST = 64.0


class Algebra(NamedTuple):
    """Operations on stacks of square matrices in some layout.

    Attributes:
      times: Product of two matrices.
      transposed: Transpose.
      eye_like: Identity matrices.
      add_product: ``x + y z``, unfused, for use by every row of a basis.
      settled: The identity function, unfused.
      inverse_factor: ``Q`` such that the columns of ``A (I + Q)`` are orthonormal, where ``A^T A = I + E`` and E is
        small.
      versine_sinc: See :func:`subspace_jax.linalg.versine_sinc_sqrt`.
    """

    times: Callable
    transposed: Callable
    eye_like: Callable
    add_product: Callable
    settled: Callable
    inverse_factor: Callable
    versine_sinc: Callable


class Combination(NamedTuple):
    """Coefficients of ``S of_s + D of_d``."""

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
    """Composes a step of length ``size`` against a direction D, and the transport of D.

    Args:
      overlap: ``S^T D``, ``[..., k, k]``.
      square: ``H^T H`` for ``H = D - S (S^T D)``.
      drift: ``S^T S - I`` to be removed, or zeros.
      size: Step size, a scalar or ``[..., 1, 1]``.
      transport: "euclidean" leaves the direction unchanged, "project" takes its tangent part at ``S``, "parallel"
        transports that along the step.
      retraction: "exp", "qr", "polar" or "cayley".
      algebra: Layout of the matrices, in the last two axes by default; others support "exp" only.

    Returns:
      Coefficients of ``new - S``, and of the direction in the basis ``new``, None if it is unchanged.
    """
    algebra = algebra or LAST_AXES
    times, transposed = algebra.times, algebra.transposed
    eye = algebra.eye_like(square)
    p, y = _coefficients(size * size * square, retraction, algebra)
    y = -size * y

    # S X + H Y has the Gram matrix I + excess.  Bases keep their drift, or lose it if due, and a step adds next to
    # none, whatever the errors of X and Y.
    def inner(x, metric, y):
        return times(transposed(x), times(metric, y))

    def of_direction(of_s, of_h):
        """Returns ``S of_s + H of_h`` in terms of D, so that H need not be stored."""
        return Combination(algebra.add_product(of_s, -overlap, of_h), algebra.settled(of_h))

    x = eye + p
    cross = -inner(x, times(drift, overlap), y)
    excess = p + transposed(p) + times(transposed(p), p) + inner(x, drift, x) + inner(y, square, y)
    q = algebra.inverse_factor(excess + cross + transposed(cross))
    p, y = p + q + times(p, q), times(y, eye + q)
    update = of_direction(p, y)

    # The qr retraction rotates the basis within its subspace, and vectors in that basis have to rotate with it:
    # otherwise trajectories from S and S Q, the same point, would differ.  The other retractions do not rotate it.
    rotation = linalg.polar(eye + p) if retraction == "qr" else None
    if transport == "euclidean":
        return update, None if rotation is None else Combination(jnp.zeros_like(eye), rotation)
    if transport == "project":
        return update, of_direction(jnp.zeros_like(eye), eye if rotation is None else rotation)
    versine, sinc = algebra.versine_sinc(size * size * square)
    along_s, along_h = times(size * sinc, square), eye - versine
    if rotation is not None:
        along_s, along_h = times(along_s, rotation), times(along_h, rotation)
    if retraction != "exp":
        # The geodesic of the transport ends near the new point: project to the tangent space there.
        x = eye + p
        normal = inner(x, eye + drift, along_s) + inner(y, square, along_h)
        along_s, along_h = along_s - times(x, normal), along_h - times(y, normal)
    return update, of_direction(along_s, along_h)


def _coefficients(m: jax.Array, retraction: str, algebra: Algebra) -> tuple[jax.Array, jax.Array]:
    """Returns ``P, Y`` such that ``S (I + P) + V Y`` is the retraction of ``V``, given ``M = V^T V``."""
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
    """Returns ``1 / sqrt(1 + x) - 1``, accurate for small x, and ``1 / sqrt(1 + x)``."""
    root = jnp.sqrt(1 + x)
    return -x / (root * (1 + root)), 1 / root


def _inverse_factor(e: jax.Array) -> jax.Array:
    """Returns upper triangular ``Q`` such that ``A (I + Q)`` has orthonormal columns, where ``A^T A = I + E``."""
    eye = eye_like(e)
    r = jnp.linalg.cholesky(eye + e).mT
    q = jax.lax.linalg.triangular_solve(r, eye, left_side=True, lower=False) - eye
    # The factor carries a rounding of I.  The Gram matrix that it leaves is known better, and corrects it.
    left = e + q + q.mT + times(q.mT, q) + times(e, q) + times(q.mT, e) + times(q.mT, times(e, q))
    half = jnp.triu(left) - left * eye / 2
    return q - half - times(q, half)


# Results that multiply the rows of bases end in a matmul: elementwise work would be fused into the product with the
# rows, and recomputed for every row.
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
