"""Square matrices ``[k, k, classes]``, one class per lane: products of small matrices as vector work."""

import math

import jax
import jax.numpy as jnp

from subspace_jax.kernels.grassmann_step.coefficients import Algebra

# Norms up to 4^6, steps of up to 64 radians.
MAX_DOUBLINGS = 6
_DEGREE = 4  # of the series in M, whose remainder at norm 1 is below half a rounding
_REFINEMENTS = 3


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    return sum(x[:, i : i + 1] * y[i : i + 1] for i in range(x.shape[0]))


def _eye_like(x: jax.Array) -> jax.Array:
    i, j = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(i == j, 1.0, 0.0)


def norm(m: jax.Array) -> jax.Array:
    """Returns the largest row sum of each matrix, ``[1, 1, classes]``."""
    return jnp.max(jnp.sum(jnp.abs(m), axis=1, keepdims=True), axis=0, keepdims=True)


def _inverse_factor(e: jax.Array) -> jax.Array:
    """Returns ``(I + E)^(-1/2) - I`` by Newton's iteration, for E well below I."""
    q = -e / 2
    for _ in range(_REFINEMENTS):
        # (I + Q) (I + E) (I + Q) - I, in small terms.
        around = e + _times(e, q)
        left = around + 2 * q + _times(q, q) + _times(q, around)
        q = q - left / 2 - _times(q, left) / 2
    return q


def _versine_sinc(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Like :func:`subspace_jax.linalg.versine_sinc_sqrt`, for norms of at most 4096."""
    doublings = jnp.clip(jnp.ceil(jnp.log2(jnp.maximum(norm(m), 1.0)) / 2), 0, MAX_DOUBLINGS)
    m = m * jnp.exp2(-2 * doublings)
    square, eye = _times(m, m), _eye_like(m)

    def series(first):
        terms = [(-1) ** i / math.factorial(2 * i + first) for i in range(_DEGREE + 1)]
        total = terms[4] * square + terms[3] * m + terms[2] * eye
        return _times(square, total) + terms[1] * m + terms[0] * eye

    def double(i, state):
        versine, sinc = state
        due = i.astype(m.dtype) < doublings
        doubled = 4 * versine - 2 * _times(versine, versine)
        return jnp.where(due, doubled, versine), jnp.where(due, sinc - _times(sinc, versine), sinc)

    most = jnp.max(doublings).astype(jnp.int32)
    return jax.lax.fori_loop(0, most, double, (_times(m, series(2)), series(1)))


LANES = Algebra(
    times=_times,
    transposed=lambda x: jnp.swapaxes(x, 0, 1),
    eye_like=_eye_like,
    add_product=lambda x, y, z: x + _times(y, z),
    settled=lambda x: x,
    inverse_factor=_inverse_factor,
    versine_sinc=_versine_sinc,
)
