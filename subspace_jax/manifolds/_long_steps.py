"""Steps of many radians, for which Gram matrices ``H^T H`` are not accurate enough.

The rounding error of ``H^T H`` scales with the square of the longest column: a step computed from it leaves the
manifold by the machine precision times the squared length.  These functions use a QR factorization of ``n x k`` columns
instead, which costs more; results are orthonormal for any length and for ``H`` of any rank.  Derivatives are those of
the formulas for short steps, except for retractions that are Q factors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from subspace_jax.linalg import (
    binary_scale,
    expm,
    eye_like,
    gram,
    nan_for_infinite,
    polar_step,
    positive_qr,
    singular,
    times,
)

# Radians.  Below, errors of Gram matrices are a few roundings.
_SHORT = 4.0
# Bound of the 1-norm of matrices to be exponentiated.
_EXPM_RANGE = 1024.0


def by_length(short: Callable, long: Callable, h: jax.Array, *args: jax.Array) -> jax.Array:
    """Returns ``short(*args)``, or ``long(*args)`` if any vector of ``h [..., n, k]`` is longer than 4.

    Under ``vmap`` over ``h`` both are computed, as `cond` becomes a selection.
    """
    lengths = jnp.linalg.norm(jax.lax.stop_gradient(h), axis=(-2, -1))
    return jax.lax.cond(jnp.any(lengths > _SHORT), long, short, *args)


def bounded_step(h: jax.Array) -> jax.Array:
    """Bounds the length of a step such that three digits of its angle remain: 16384 radians in float32."""
    scale = binary_scale(h, (-2, -1))
    h = h / scale
    length = jnp.linalg.norm(jax.lax.stop_gradient(h), axis=(-2, -1), keepdims=True)
    most = 1 / (512 * float(jnp.finfo(h.dtype).eps))
    return h * jnp.minimum(scale, most / jnp.where(length > 0, length, 1))


def with_tangents_of(formula: Callable, f: Callable) -> Callable:
    """Returns ``f`` with the derivatives of a formula of the same value."""
    wrapped = jax.custom_jvp(f)

    @wrapped.defjvp
    def _(primals, tangents):
        return wrapped(*primals), jax.jvp(formula, primals, tangents)[1]

    return wrapped


def q_factor(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns Q, R and the scale ``[..., 1, 1]`` of R, for ``x`` of any magnitude."""
    scale = binary_scale(x, (-2, -1))
    return *positive_qr(x / scale), scale


def polar_factor(x: jax.Array) -> jax.Array:
    """Returns the orthonormal matrix nearest to ``x``."""
    q, r, _ = q_factor(x)
    return polar_step(times(q, singular(jnp.ones_like, r)))


def reflected(s: jax.Array, h: jax.Array) -> jax.Array:
    """Returns Cayley's retraction on the Grassmann manifold: ``S`` reflected in the span of ``S + H / 2``."""
    q = polar_step(q_factor(s + h / 2)[0])
    return 2 * times(q, gram(q, s)) - s


def geodesic(s: jax.Array, h: jax.Array) -> jax.Array:
    """Returns the end of the geodesic on the Grassmann manifold, by the thin SVD of ``H``."""
    u, angles, v = _singular_vectors(h)
    angles = angles[..., None, :]
    return polished(times(times(s, v) * jnp.cos(angles) + u * jnp.sin(angles), v.mT))


def transported(s: jax.Array, h: jax.Array, d: jax.Array) -> jax.Array:
    """Returns ``D`` transported to the end of that geodesic."""
    u, angles, v = _singular_vectors(h)
    overlap, angles = gram(u, d), angles[..., :, None]
    return d - times(u, 2 * jnp.sin(angles / 2) ** 2 * overlap) - times(s, times(v, jnp.sin(angles) * overlap))


def _singular_vectors(h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, r, scale = q_factor(h)
    u, values, vt = jnp.linalg.svd(nan_for_infinite(r))
    return times(q, polar_step(u)), values * scale[..., 0], polar_step(vt.mT)


def polished(y: jax.Array) -> jax.Array:
    """Orthonormalizes a matrix that is orthonormal up to the rounding of angles."""
    return polar_step(polar_step(y))


def rotated(s: jax.Array, skew: jax.Array, normal: jax.Array) -> jax.Array:
    """Returns the frame at the end of the Stiefel geodesic from ``S`` with velocity ``S A + N``."""
    q, r, scale = q_factor(normal)
    r, k = scale * r, r.shape[-1]
    rotation = polished(expm(jnp.block([[skew, -r.mT], [r, jnp.zeros_like(r)]])))[..., :k]
    return polished(times(s, rotation[..., :k, :]) + times(q, rotation[..., k:, :]))


def cayley_rotated(s: jax.Array, skew: jax.Array, normal: jax.Array) -> jax.Array:
    """Returns the same with Cayley's transform instead of the exponential."""
    q, r, scale = q_factor(normal)
    r, k = scale * r, r.shape[-1]
    half = jnp.block([[skew, -r.mT], [r, jnp.zeros_like(r)]]) / 2
    rotation = polished(jnp.linalg.solve(eye_like(half) - half, eye_like(half) + half))[..., :k]
    return polished(times(s, rotation[..., :k, :]) + times(q, rotation[..., k:, :]))


def within_expm_range(skew: jax.Array, normal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales a step ``S A + N`` such that the 1-norm of the matrix to be exponentiated is at most 1024."""
    scale = jnp.maximum(binary_scale(skew, (-2, -1)), binary_scale(normal, (-2, -1)))
    skew, normal = skew / scale, normal / scale
    fixed_skew, fixed_normal = jax.lax.stop_gradient((skew, normal))
    length = jnp.linalg.norm(fixed_normal, axis=(-2, -1), keepdims=True) * skew.shape[-1] ** 0.5
    bound = jnp.max(jnp.sum(jnp.abs(fixed_skew), axis=-2, keepdims=True), axis=-1, keepdims=True) + length
    factor = jnp.minimum(scale, _EXPM_RANGE / jnp.where(bound > 0, bound, 1.0))
    return factor * skew, factor * normal
