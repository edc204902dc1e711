"""The Grassmann manifold of k-dimensional subspaces of R^n, points as orthonormal bases ``[..., n, k]``.

A tangent vector at ``S`` is a matrix ``H`` of the same shape with ``S^T H = 0``; the metric is ``<H, D> = tr(H^T D)``.
The formulas are those of Edelman, Arias and Smith, "The Geometry of Algorithms with Orthogonality Constraints"
(physics/9806030), and of arXiv 2308.01547, written through the ``k x k`` Gram matrix ``M = H^T H``: geodesics and
retractions are ``S c(M) + H d(M)`` for scalar functions c and d, so no ``n x k`` singular value decomposition and no
``n x n`` matrix occurs, and a step costs a few passes over its arguments.

All functions broadcast over leading axes, compute in float32 or wider with full-precision products, and return the
dtype of their first argument.  They can be differentiated once, unless they say otherwise.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import linalg
from subspace_jax.linalg import gram, spectral, times

RETRACTIONS = ("exp", "qr", "polar", "cayley")


def random_point(
    key: jax.Array, n: int, k: int, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws subspaces uniformly; see :func:`subspace_jax.linalg.random_orthonormal`."""
    return linalg.random_orthonormal(key, n, k, batch_shape, dtype)


def tangent_project(s: jax.Array, x: jax.Array) -> jax.Array:
    """Orthogonal projection onto the tangent space, ``X - S (S^T X)``; turns a Euclidean gradient into the Riemannian.

    Args:
      s: Basis ``[..., n, k]``.
      x: Any matrix of that shape.

    Returns:
      The tangent vector.
    """
    (s, x), cast = _working(s, x)
    return cast(_project(s, x))


def exp(s: jax.Array, h: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """Point that the geodesic from ``S`` with velocity ``H`` reaches at time ``t``.

    With the thin SVD ``H = U diag(s) R^T`` this is ``(S R cos(t s) + U sin(t s)) R^T``, computed as
    ``S cos(t sqrt(M)) + t H sinc(t sqrt(M))``.

    Args:
      s: Basis ``[..., n, k]``.
      h: Tangent vector at ``s``.
      t: Time, a scalar.

    Returns:
      Basis of the point.
    """
    (s, h), cast = _working(s, h)
    return cast(_step(s, h, jnp.asarray(t, s.dtype), "exp"))


def geodesic(s: jax.Array, x: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """``exp(S, tangent_project(S, X), t)``: moves along the tangent part of any direction.

    Args:
      s: Basis ``[..., n, k]``.
      x: Direction, not necessarily tangent.
      t: Time, a scalar.

    Returns:
      Basis of the point.
    """
    (s, x), cast = _working(s, x)
    return cast(_step(s, _project(s, x), jnp.asarray(t, s.dtype), "exp"))


def log(s: jax.Array, y: jax.Array) -> jax.Array:
    """Tangent vector at ``S`` whose geodesic reaches the subspace of ``Y`` at time 1; the inverse of :func:`exp`.

    With ``L = Y - S S^T Y`` it is ``L f(L^T L) Y^T S``, f(x) = arcsin(sqrt(x)) / sqrt(x (1 - x)).

    Args:
      s: Basis ``[..., n, k]``.
      y: Basis ``[..., n, k]``; the result does not depend on which basis of its subspace.

    Returns:
      The tangent vector.  Undefined where a principal angle is a right angle (the cut locus); near it the relative
      error grows like the machine precision over the squared cosine of the largest angle.
    """
    (s, y), cast = _working(s, y)
    overlap = gram(s, y)
    rest = y - times(s, overlap)
    (f,) = spectral(lambda x: (linalg.arcsine_ratio(x),), gram(rest, rest))
    return cast(times(rest, times(f, overlap.mT)))


def dist(s: jax.Array, y: jax.Array) -> jax.Array:
    """Geodesic distance: the Euclidean norm of the principal angles.

    Args:
      s: Basis ``[..., n, k]``.
      y: Basis ``[..., n, k]``.

    Returns:
      ``[...]`` in radians, at least float32.  Not differentiable where an angle vanishes.
    """
    return jnp.linalg.norm(linalg.principal_angles(s, y), axis=-1)


principal_angles = linalg.principal_angles
orthonormality_error = linalg.orthonormality_error


def parallel_transport(s: jax.Array, h: jax.Array, d: jax.Array, t: ArrayLike = 1.0) -> jax.Array:
    """Carries a tangent vector along the geodesic ``exp(S, t H)``; an isometry.

    ``D + (U (cos(t s) - 1) - S R sin(t s)) U^T D`` for the thin SVD of ``H``, computed through ``H^T H`` and
    ``H^T D``.

    Args:
      s: Basis ``[..., n, k]``.
      h: Velocity of the geodesic, tangent at ``s``.
      d: Tangent vector at ``s``.
      t: Time, a scalar.

    Returns:
      Tangent vector at ``exp(s, h, t)``.
    """
    (s, h, d), cast = _working(s, h, d)
    t = jnp.asarray(t, s.dtype)
    versine, sinc = spectral(lambda x: (linalg.versine_sqrt(x), linalg.sinc_sqrt(x)), t * t * gram(h, h))
    inner = gram(h, d)
    return cast(d - t * t * times(h, times(versine, inner)) - t * times(s, times(sinc, inner)))


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
    if method not in RETRACTIONS:
        raise ValueError(f"method: expected one of {RETRACTIONS}, got {method!r}")
    (s, h), cast = _working(s, h)
    return cast(_step(s, h, jnp.ones((), s.dtype), method))


def reorthonormalize(s: jax.Array, method: str = "qr") -> jax.Array:
    """Removes the drift of a nearly orthonormal basis, moving it by no more than the drift.

    Args:
      s: ``[..., n, k]`` with ``||S^T S - I||`` below about 0.1.
      method: "qr" keeps the flag of leading columns (QR with positive diagonal, by Cholesky); "polar" takes one Newton
        step towards the nearest orthonormal matrix, which squares the error.

    Returns:
      The basis, of the same subspace.

    Raises:
      ValueError: ``method`` is unknown.
    """
    (s,), cast = _working(s)
    if method == "qr":
        return cast(linalg.cholesky_qr(s)[0])
    if method == "polar":
        return cast(linalg.polar_step(s))
    raise ValueError(f"method: expected 'qr' or 'polar', got {method!r}")


def align(s: jax.Array, s_new: jax.Array) -> jax.Array:
    """Rotation that a step applied to the basis: the polar factor of ``S^T S_new``.

    Vectors stored in the old basis are multiplied by it from the right.  Needs ``S^T S_new`` to be regular: no
    direction has turned by a right angle.

    Args:
      s: Basis before the step, ``[..., n, k]``.
      s_new: Basis after it.

    Returns:
      Orthogonal ``[..., k, k]``.
    """
    (s, s_new), _ = _working(s, s_new)
    return linalg.polar(gram(s, s_new))


def _working(*arrays: jax.Array):
    """Brings all to the working dtype; also returns the way back to the dtype of the first."""
    for x in arrays:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"expected floating-point matrices, got {x.dtype}")
        if x.ndim < 2 or x.shape[-1] > x.shape[-2] or x.shape[-2:] != arrays[0].shape[-2:]:
            raise ValueError(f"expected matrices [..., n, k] of one shape with k <= n, got {[a.shape for a in arrays]}")
    dtype, out = linalg.working_dtype(*arrays), arrays[0].dtype
    return [x.astype(dtype) for x in arrays], lambda x: x.astype(out)


def _project(s: jax.Array, x: jax.Array) -> jax.Array:
    return x - times(s, gram(s, x))


def _step(s: jax.Array, h: jax.Array, t: jax.Array, method: str) -> jax.Array:
    """Retraction of ``t h``, as ``S c(t^2 M) + t H d(t^2 M)``."""
    m = t * t * gram(h, h)
    if method == "exp":
        c, d = spectral(lambda x: (linalg.cos_sqrt(x), linalg.sinc_sqrt(x)), m)
    elif method == "cayley":
        c, d = spectral(lambda x: ((1 - x / 4) / (1 + x / 4), 1 / (1 + x / 4)), m)
    elif method == "polar":
        (c,) = spectral(lambda x: (jax.lax.rsqrt(1 + x),), m)
        d = c
    else:
        return linalg.cholesky_qr2(s + t * h)[0]
    return times(s, c) + times(h, t * d)
