"""Parallel transport of the canonical Stiefel metric in coordinates."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import expm, expm_action, eye_like, gram, times


def transport(s: jax.Array, skew: jax.Array, normal: jax.Array, c: jax.Array, e: jax.Array) -> jax.Array:
    """Transports ``D = S C + E`` along the geodesic with velocity ``S A + N``, from time 0 to 1.

    In the rotating frame the vector keeps the form ``S C + N F + E P`` with ``k x k`` matrices C, F and P.

    Args:
      s: Frame ``[..., n, k]``.
      skew: ``A``, ``[..., k, k]``.
      normal: ``N``, ``[..., n, k]``.
      c: ``C``, ``[..., k, k]``.
      e: ``E``, ``[..., n, k]``.

    Returns:
      Tangent vector at the end of the geodesic, ``[..., n, k]``.
    """
    normal, size = unit_normal(normal)
    e, length = unit_normal(e)
    g, cross, k = gram(normal, normal), gram(normal, e), skew.shape[-1]

    def turn(state):
        c, f, p = state
        exchanged = size * (times(cross, p) + times(g, f))
        around = times(skew, c) - times(c, skew)
        return (
            (exchanged - exchanged.mT - around) / 2,
            (times(f, skew) - size * c) / 2,
            times(p, skew) / 2,
        )

    bound = jnp.max(jnp.linalg.norm(skew, axis=(-2, -1), keepdims=True) + 2 * size)
    start = (c, jnp.zeros_like(c), length * eye_like(c))
    state = jnp.concatenate(expm_action(turn, start, bound), axis=-2)

    # The frame itself turns by the exponential of W, which maps [S, N, E] to itself.
    zero = jnp.zeros_like(skew)
    rows = [[skew, -size * g, -size * cross], [size * eye_like(skew), zero, zero], [zero, zero, zero]]
    out = times(expm(jnp.block(rows)), state)
    return times(s, out[..., :k, :]) + times(normal, out[..., k : 2 * k, :]) + times(e, out[..., 2 * k :, :])


def unit_normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides a normal part by its norm, which balances the coordinates.

    Results are the same whatever the factor, so it needs no derivative; for a normal part of zero it is 1.
    """
    size = jax.lax.stop_gradient(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True))
    size = jnp.where(size > 0, size, 1.0)
    return x / size, size
