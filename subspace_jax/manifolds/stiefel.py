"""The Stiefel manifold of orthonormal k-frames in R^n, points as matrices ``[..., n, k]`` with orthonormal columns.

A tangent vector at ``S`` is ``H = S A + N`` with ``A = S^T H`` skew and ``S^T N = 0``.  The metric is the canonical
one, ``<H, D> = tr(H^T (I - S S^T / 2) D)``, which counts every coordinate of ``A`` once.  Geodesics are those of
Edelman, Arias and Smith, "The Geometry of Algorithms with Orthogonality Constraints" (physics/9806030), section 2.4.
They rotate ``S`` by the exponential of ``W = N S^T - S N^T + S A S^T``, which maps ``[S, N]`` to itself with the small
matrix ``[[A, -N^T N], [I, 0]]``; in that (not orthonormal) basis a step needs neither a QR factorization nor an
``n x n`` matrix, and the normal part may have any rank, zero included.

All functions broadcast over leading axes, compute in float32 or wider with full-precision matmuls, and return the
dtype of their first argument.  Points are float32 or float64 (TypeError otherwise), vectors of any floating-point
dtype; shapes that do not match raise ValueError.  They are differentiable any number of times unless stated
otherwise.  Vectors that are tangent up to rounding are treated as tangent.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax.linalg import expm, eye_like, gram, times
from subspace_jax.manifolds._long_steps import (
    by_length,
    cayley_rotated,
    rotated,
    with_tangents_of,
    within_expm_range,
)
from subspace_jax.manifolds._shared import (
    RETRACTIONS,
    at_time,
    check_retraction,
    is_coarse,
    orthonormality_error,
    polar_retraction,
    qr_retraction,
    random_point,
    reorthonormalize,
    rounding,
    working,
)
from subspace_jax.manifolds._stiefel_log import log_parts
from subspace_jax.manifolds._stiefel_transport import transport, unit_normal

__all__ = [
    "RETRACTIONS",
    "dist",
    "exp",
    "geodesic",
    "inner",
    "log",
    "orthonormality_error",
    "parallel_transport",
    "projection_transport",
    "random_point",
    "reorthonormalize",
    "retract",
    "riemannian_gradient",
    "tangent_project",
]


def tangent_project(s: jax.Array, x: jax.Array) -> jax.Array:
    """Removes ``S sym(S^T X)``: the nearest tangent vector in the Frobenius norm.

    Args:
      s: Frame ``[..., n, k]``.
      x: Any matrix of that shape.

    Returns:
      The tangent vector.
    """
    (s, x), cast = working({"s": s}, {"x": x})
    return cast(_project(s, x))


def riemannian_gradient(s: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient in the canonical metric, ``G - S G^T S`` for the Euclidean gradient ``G``.

    :func:`tangent_project` of ``G`` is the gradient in the Euclidean metric; the two differ by a factor 2 in ``A``.

    Args:
      s: Frame ``[..., n, k]``.
      g: Gradient with respect to the entries of ``s``.

    Returns:
      The tangent vector whose inner product with any other is the directional derivative.
    """
    (s, g), cast = working({"s": s}, {"g": g})
    return cast(g - times(s, gram(g, s)))


def inner(s: jax.Array, h: jax.Array, d: jax.Array) -> jax.Array:
    """Canonical metric ``tr(H^T (I - S S^T / 2) D)``.

    Args:
      s: Frame ``[..., n, k]``.
      h: Tangent vector at ``s``.
      d: Tangent vector at ``s``.

    Returns:
      ``[...]``, at least float32.
    """
    (s, h, d), _ = working({"s": s}, {"h": h, "d": d})
    return jnp.sum(h * d, axis=(-2, -1)) - jnp.sum(gram(s, h) * gram(s, d), axis=(-2, -1)) / 2


def exp(s: jax.Array, h: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """Returns the point of the geodesic from ``S`` with velocity ``H`` at time ``t``.

    Args:
      s: Frame ``[..., n, k]``.
      h: Tangent vector at ``s``.
      t: Time, a scalar or one value per leading axis entry.

    Returns:
      The frame.  The length of a step is bounded such that the 1-norm of the exponentiated matrix is at most 1024,
      which is hundreds of radians.
    """
    (s, h), cast = working({"s": s}, {"h": h})
    return cast(_exp(*at_time(t, s, h)))


def geodesic(s: jax.Array, x: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """``exp(S, tangent_project(S, X), t)``: moves along the tangent part of any direction.

    Args:
      s: Frame ``[..., n, k]``.
      x: Direction, not necessarily tangent.
      t: Time, a scalar or one value per leading axis entry.

    Returns:
      The frame.
    """
    (s, x), cast = working({"s": s}, {"x": x})
    return cast(_exp(*at_time(t, s, _project(s, x))))


def log(s: jax.Array, y: jax.Array, num_iters: int = 20) -> jax.Array:
    """Returns the tangent vector at ``S`` whose geodesic reaches ``Y`` at time 1; the inverse of :func:`exp`.

    There is no closed form.  This solves the equations of Zimmermann (arXiv 1604.05054) by a shooting iteration on
    ``k x k`` matrices; the derivative of exp is taken in the frame half-way along the geodesic, where it is the
    identity up to second order in the length.  No matrix logarithm and no orthogonal completion is needed.

    Domain: geodesics are unique up to the injectivity radius, at least ``sqrt(4/5) pi`` = 2.81 (Rentmeesters' curvature
    bound, quoted in arXiv 2403.03782).  At distance 1.5 six iterations reach 1e-12, at 2.2 ten; 20 reach 1e-8 or
    better up to 2.7.  Beyond that the geodesic found may not be the shortest, or none is found.

    Args:
      s: Frame ``[..., n, k]``.
      y: Frame ``[..., n, k]``.
      num_iters: Iterations, static.

    Returns:
      The tangent vector; NaN if the iteration has not reached ``Y`` to the square root of the machine precision, as for
      frames with ``k = n`` of opposite orientation, which no geodesic connects.

    Raises:
      ValueError: ``num_iters`` is below 1.
    """
    (s, y), cast = working({"s": s, "y": y})
    skew, normal = _log(s, y, num_iters)
    return cast(times(s, skew) + normal)


def dist(s: jax.Array, y: jax.Array, num_iters: int = 20) -> jax.Array:
    """Geodesic distance in the canonical metric: the norm of :func:`log`, on the same domain.

    Args:
      s: Frame ``[..., n, k]``.
      y: Frame ``[..., n, k]``.
      num_iters: Iterations, static.

    Returns:
      ``[...]``, at least float32, NaN where :func:`log` is.  Its derivative is 0 for frames that are equal up to
      rounding.

    Raises:
      ValueError: ``num_iters`` is below 1.
    """
    (s, y), _ = working({"s": s, "y": y})
    skew, normal = _log(s, y, num_iters)
    square = jnp.sum(skew * skew, axis=(-2, -1)) / 2 + jnp.sum(normal * normal, axis=(-2, -1))
    same = square <= rounding(s) ** 2
    return jnp.where(same, jnp.sqrt(jax.lax.stop_gradient(square)), jnp.sqrt(jnp.where(same, 1.0, square)))


def parallel_transport(s: jax.Array, h: jax.Array, d: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """Transports a tangent vector along the geodesic ``exp(S, t H)``; an isometry of the canonical metric.

    In the frame that rotates with the geodesic, transport is a linear differential equation with constant coefficients:
    for ``D = S C + E`` it is ``C' = -([A, C] - N^T E + E^T N) / 2``, ``E' = (E A - N C) / 2`` (the quotient metric is
    naturally reductive; Edelman, Arias and Smith, section 2.2.3, do it for the Euclidean metric).  It is solved by the
    exponential of its ``k x k`` coordinates, to working precision and not by a time stepper.

    Args:
      s: Frame ``[..., n, k]``.
      h: Velocity of the geodesic, tangent at ``s``.
      d: Tangent vector at ``s``.
      t: Time, a scalar or one value per leading axis entry.

    Returns:
      Tangent vector at ``exp(s, h, t)``; NaN where the longest step of the batch is longer than about 13.
    """
    (s, h, d), cast = working({"s": s}, {"h": h, "d": d})
    s, d, h = at_time(t, s, d, h)
    return cast(transport(s, *_parts(s, h), *_parts(s, d)))


def projection_transport(s_new: jax.Array, d: jax.Array) -> jax.Array:
    """Transports a tangent vector to a nearby point by projection: cheap, but no isometry.

    It follows the embedded metric, not the canonical one, and differs from :func:`parallel_transport` by O(step).

    Args:
      s_new: Target frame, ``[..., n, k]``.
      d: The vector.

    Returns:
      Tangent vector at ``s_new``.
    """
    return tangent_project(s_new, d)


def retract(s: jax.Array, h: jax.Array, method: str = "exp") -> jax.Array:
    """Moves from ``S`` in the direction ``H``.

    "cayley" replaces the exponential of ``W`` by Cayley's transform and differs from "exp" by O(||H||^3).  "polar", the
    orthonormal matrix nearest to ``S + H``, and "qr", its Q factor, differ by O(||H||^2): they follow the geodesics of
    the embedded metric, or none.

    Args:
      s: Frame ``[..., n, k]``.
      h: Tangent vector at ``s``, the step.
      method: "exp", "qr", "polar" or "cayley".

    Returns:
      The frame.  "polar" can be differentiated once.

    Raises:
      ValueError: ``method`` is unknown.
    """
    check_retraction(method)
    coarse = is_coarse(h)
    (s, h), cast = working({"s": s}, {"h": h})
    h = _project(s, h) if coarse else h
    return cast({"exp": _exp, "qr": qr_retraction, "polar": polar_retraction, "cayley": _cayley}[method](s, h))


def _project(s: jax.Array, x: jax.Array) -> jax.Array:
    overlap = gram(s, x)
    return x - times(s, (overlap + overlap.mT) / 2)


def _parts(s: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the skew and the normal part of a tangent vector."""
    overlap = gram(s, h)
    return (overlap - overlap.mT) / 2, h - times(s, overlap)


# Jitted for eager calls: a `cond` of new functions is a new program.
@functools.partial(jax.jit, inline=True)
def _exp(s: jax.Array, h: jax.Array) -> jax.Array:
    def long(s, h):
        return with_tangents_of(_short_exp, rotated)(s, *within_expm_range(*_parts(s, h)))

    return by_length(lambda s, h: _short_exp(s, *_parts(s, h)), long, h, s, h)


def _short_exp(s: jax.Array, skew: jax.Array, normal: jax.Array) -> jax.Array:
    normal, size = unit_normal(normal)
    eye, k = eye_like(skew), skew.shape[-1]
    rotation = expm(jnp.block([[skew, -size * gram(normal, normal)], [size * eye, jnp.zeros_like(skew)]]))[..., :k]
    return times(s, rotation[..., :k, :]) + times(normal, rotation[..., k:, :])


@functools.partial(jax.jit, inline=True)
def _cayley(s: jax.Array, h: jax.Array) -> jax.Array:
    def long(s, h):
        return with_tangents_of(_short_cayley, cayley_rotated)(s, *within_expm_range(*_parts(s, h)))

    return by_length(lambda s, h: _short_cayley(s, *_parts(s, h)), long, h, s, h)


def _short_cayley(s: jax.Array, skew: jax.Array, normal: jax.Array) -> jax.Array:
    c = skew / 2 - gram(normal, normal) / 4
    inverse = jnp.linalg.inv(eye_like(c) - c)
    return s + times(s, 2 * times(c, inverse)) + times(normal, inverse)


def _log(s: jax.Array, y: jax.Array, num_iters: int) -> tuple[jax.Array, jax.Array]:
    if num_iters < 1:
        raise ValueError(f"num_iters: expected at least 1, got {num_iters}")
    overlap = gram(s, y)
    rest = y - times(s, overlap)
    rest = rest - times(s, gram(s, rest))
    skew, factor = log_parts(overlap, gram(rest, rest), num_iters)
    return skew, times(rest, factor)
