"""The Grassmann manifold of k-dimensional subspaces of R^n, points as orthonormal bases ``[..., n, k]``.

A tangent vector at ``S`` is a matrix ``H`` of the same shape with ``S^T H = 0``; the metric is ``<H, D> = tr(H^T D)``.
The formulas are those of Edelman, Arias and Smith, "The Geometry of Algorithms with Orthogonality Constraints"
(physics/9806030), and of arXiv 2308.01547, written through the ``k x k`` Gram matrix ``M = H^T H``: geodesics and
retractions are ``S c(M) + H d(M)`` for scalar functions c and d, so no ``n x k`` singular value decomposition and no
``n x n`` matrix occurs, and a step costs a few passes over its arguments.  If a step of the batch is longer than 4
(radians, for geodesics), a QR factorization replaces M (under ``vmap`` both are computed): results are orthonormal for
steps of any length.

All functions broadcast over leading axes, compute in float32 or wider with full-precision products, and return the
dtype of their first argument.  Points are float32 or float64 (TypeError otherwise), vectors of any floating-point
dtype, and those coarser than float32 are projected to the tangent space first; shapes that do not match raise
ValueError.  They are differentiable once unless stated otherwise.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.linalg import gram, spectral, times
from subspace_jax.manifolds._long_steps import bounded_step, by_length, reflected, transported, with_tangents_of
from subspace_jax.manifolds._long_steps import geodesic as geodesic_by_qr
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

__all__ = [
    "RETRACTIONS",
    "align",
    "dist",
    "exp",
    "geodesic",
    "inner",
    "log",
    "orthonormality_error",
    "parallel_transport",
    "principal_angles",
    "projection_transport",
    "random_point",
    "reorthonormalize",
    "retract",
    "riemannian_gradient",
    "tangent_project",
]

principal_angles = linalg.principal_angles


def tangent_project(s: jax.Array, x: jax.Array) -> jax.Array:
    """Orthogonal projection onto the tangent space, ``X - S (S^T X)``; turns a Euclidean gradient into the Riemannian.

    Args:
      s: Basis ``[..., n, k]``.
      x: Any matrix of that shape.

    Returns:
      The tangent vector.
    """
    (s, x), cast = working({"s": s}, {"x": x})
    return cast(_project(s, x))


def riemannian_gradient(s: jax.Array, g: jax.Array) -> jax.Array:
    """Gradient on the manifold, given the Euclidean one: here its tangent part.

    Args:
      s: Basis ``[..., n, k]``.
      g: Gradient with respect to the entries of ``s``.

    Returns:
      The tangent vector whose inner product with any other is the directional derivative.
    """
    return tangent_project(s, g)


def inner(s: jax.Array, h: jax.Array, d: jax.Array) -> jax.Array:
    """Metric ``tr(H^T D)``, the same at every point.

    Args:
      s: Basis ``[..., n, k]``.
      h: Tangent vector at ``s``.
      d: Tangent vector at ``s``.

    Returns:
      ``[...]``, at least float32.
    """
    (_, h, d), _ = working({"s": s}, {"h": h, "d": d})
    return jnp.sum(h * d, axis=(-2, -1))


def exp(s: jax.Array, h: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """Point that the geodesic from ``S`` with velocity ``H`` reaches at time ``t``.

    With the thin SVD ``H = U diag(s) R^T`` this is ``(S R cos(t s) + U sin(t s)) R^T``, computed as
    ``S cos(t sqrt(M)) + t H sinc(t sqrt(M))``.

    Args:
      s: Basis ``[..., n, k]``.
      h: Tangent vector at ``s``.
      t: Time, a scalar, or one for each of the leading axes.

    Returns:
      Basis of the point.  In float32 a step ends after 16384 radians, for its angle is not known to more than three
      digits there (in float64 after 8e12).
    """
    return geodesic(s, h, t) if is_coarse(h) else _exp(s, h, t)


def geodesic(s: jax.Array, x: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """``exp(S, tangent_project(S, X), t)``: moves along the tangent part of any direction.

    Args:
      s: Basis ``[..., n, k]``.
      x: Direction, not necessarily tangent.
      t: Time, a scalar, or one for each of the leading axes.

    Returns:
      Basis of the point.
    """
    (s, x), cast = working({"s": s}, {"x": x})
    return cast(_exp(s, _project(s, x), t))


def log(s: jax.Array, y: jax.Array) -> jax.Array:
    """Tangent vector at ``S`` whose geodesic reaches the subspace of ``Y`` at time 1; the inverse of :func:`exp`.

    With ``L = Y - S S^T Y`` and the singular value decomposition ``S^T Y = U diag(cos(theta)) V^T`` it is
    ``L V diag(theta / sin(theta)) U^T``: the factors are a smooth function of the cosines, so that no digit is lost at
    any angle.

    Args:
      s: Basis ``[..., n, k]``.
      y: Basis ``[..., n, k]``; the result does not depend on which basis of its subspace.

    Returns:
      The tangent vector.  Where a principal angle is a right angle (the cut locus) there are two, and it is one of
      them; near it the error grows like the machine precision over the cosine of the largest angle, as that of ``Y``
      itself does, and the derivative like one over that cosine.  All are finite.
    """
    (s, y), cast = working({"s": s, "y": y})
    return cast(_log(s, y))


def dist(s: jax.Array, y: jax.Array) -> jax.Array:
    """Geodesic distance: the Euclidean norm of the principal angles.

    Its derivative is that of the distance on the manifold, from :func:`log`, and so holds also where principal angles
    coincide or vanish; it is 0 where the subspaces are the same up to rounding, and undefined at the cut locus.

    Args:
      s: Basis ``[..., n, k]``.
      y: Basis ``[..., n, k]``.

    Returns:
      ``[...]`` in radians, at least float32.
    """
    (s, y), _ = working({"s": s, "y": y})
    return _dist(s, y)


def parallel_transport(s: jax.Array, h: jax.Array, d: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """Carries a tangent vector along the geodesic ``exp(S, t H)``; an isometry.

    ``D + (U (cos(t s) - 1) - S R sin(t s)) U^T D`` for the thin SVD of ``H``, computed through ``H^T H`` and
    ``H^T D``.

    Args:
      s: Basis ``[..., n, k]``.
      h: Velocity of the geodesic, tangent at ``s``.
      d: Tangent vector at ``s``.
      t: Time, a scalar, or one for each of the leading axes.

    Returns:
      Tangent vector at ``exp(s, h, t)``.
    """
    (s, h, d), cast = working({"s": s}, {"h": h, "d": d})
    s, d, h = at_time(t, s, d, h)
    return cast(_transport(s, h, d))


def projection_transport(s_new: jax.Array, d: jax.Array) -> jax.Array:
    """Carries a tangent vector to a near point by projecting it there: cheap, equal to first order, no isometry.

    Args:
      s_new: Basis of the point to which it is carried, ``[..., n, k]``.
      d: The vector.

    Returns:
      Tangent vector at ``s_new``.
    """
    return tangent_project(s_new, d)


def retract(s: jax.Array, h: jax.Array, method: str = "exp") -> jax.Array:
    """Moves from ``S`` in the direction ``H`` by a map that equals the geodesic to second order.

    "qr" and "polar" both reach ``span(S + H)``, "polar" without turning the basis; "cayley" is Cayley's rotation.  As
    subspaces all differ from "exp" by O(||H||^3).

    Args:
      s: Basis ``[..., n, k]``.
      h: Tangent vector at ``s``, the whole step.
      method: "exp", "qr", "polar" or "cayley".

    Returns:
      Basis of the point.

    Raises:
      ValueError: ``method`` is unknown.
    """
    check_retraction(method)
    coarse = is_coarse(h)
    (s, h), cast = working({"s": s}, {"h": h})
    return cast(_step(s, _project(s, h) if coarse else h, method))


def align(s: jax.Array, s_new: jax.Array) -> jax.Array:
    """Returns the rotation between two bases: the polar factor of ``S^T S_new``.

    Multiply vectors in the old basis by it from the right.  ``S^T S_new`` has to be regular: no principal angle is a
    right angle.

    Args:
      s: Basis before the step, ``[..., n, k]``.
      s_new: Basis after it.

    Returns:
      Orthogonal ``[..., k, k]``; NaN if ``S^T S_new`` is singular relative to its norm.
    """
    (s, s_new), cast = working({"s": s, "s_new": s_new})
    return cast(linalg.polar(gram(s, s_new)))


def _log(s: jax.Array, y: jax.Array) -> jax.Array:
    overlap = gram(s, y)
    # Twice: what rounding leaves in the span of S is as large as a tiny angle.
    rest = _project(s, y - times(s, overlap))
    # Of c = cos(theta), theta / sin(theta) = arcsin(sqrt(x)) / sqrt(x (1 - x)) with x = (1 - c) / 2 = sin(theta / 2)^2.
    factor = linalg.singular(lambda c: linalg.arcsine_ratio((1 - c) / 2), overlap)
    return times(rest, factor.mT)


def _project(s: jax.Array, x: jax.Array) -> jax.Array:
    return x - times(s, gram(s, x))


def _exp(s: jax.Array, h: jax.Array, t: ArrayLike) -> jax.Array:
    (s, h), cast = working({"s": s}, {"h": h})
    return cast(_step(*at_time(t, s, h), "exp"))


# Jitted for eager calls: a `cond` of new functions is a new program.
@functools.partial(jax.jit, static_argnames="method", inline=True)
def _step(s: jax.Array, h: jax.Array, method: str) -> jax.Array:
    """Returns the retraction of ``h``."""
    if method == "qr":
        return qr_retraction(s, h)
    if method == "polar":
        return polar_retraction(s, h)
    if method == "cayley":
        return by_length(_short_cayley, reflected, h, s, h)
    long = with_tangents_of(_short_exp, geodesic_by_qr)
    return by_length(_short_exp, lambda s, h: long(s, _project(s, bounded_step(h))), h, s, h)


# Both are S c(M) + H d(M), computed from c - 1 and d - 1 for small rounding errors of short steps.
def _short_cayley(s: jax.Array, h: jax.Array) -> jax.Array:
    c, d = spectral(lambda x: (-x / 2 / (1 + x / 4), -x / 4 / (1 + x / 4)), gram(h, h))
    return s + (h + times(s, c) + times(h, d))


def _short_exp(s: jax.Array, h: jax.Array) -> jax.Array:
    c, d = spectral(lambda x: (-x * linalg.versine_sqrt(x), linalg.sinc_sqrt(x) - 1), gram(h, h))
    return s + (h + times(s, c) + times(h, d))


@functools.partial(jax.jit, inline=True)
def _transport(s: jax.Array, h: jax.Array, d: jax.Array) -> jax.Array:
    long = with_tangents_of(_short_transport, transported)
    return by_length(_short_transport, lambda s, h, d: long(s, _project(s, bounded_step(h)), d), h, s, h, d)


def _short_transport(s: jax.Array, h: jax.Array, d: jax.Array) -> jax.Array:
    versine, sinc = spectral(lambda x: (linalg.versine_sqrt(x), linalg.sinc_sqrt(x)), gram(h, h))
    overlap = gram(h, d)
    return d - times(h, times(versine, overlap)) - times(s, times(sinc, overlap))


@jax.custom_jvp
def _dist(s: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.linalg.norm(principal_angles(s, y), axis=-1)


@_dist.defjvp
def _dist_jvp(primals, tangents):
    (s, y), (ds, dy) = primals, tangents
    out = _dist(s, y)
    slope = -jnp.sum(_log(s, y) * ds + _log(y, s) * dy, axis=(-2, -1))
    apart = out > rounding(s)
    return out, jnp.where(apart, slope / jnp.where(apart, out, 1.0), 0.0)
