"""Arrays brought to the size of 1, so that their squares neither overflow nor underflow."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Far enough from the ends of float32 that the power, its inverse and squares of what was scaled are normal numbers.
_LARGEST_EXPONENT = 100


def binary_scale(x: jax.Array, axis: int | Sequence[int] | None = None) -> jax.Array:
    """The power of two next above the largest magnitude along some axes.

    Dividing by it is exact, and leaves entries of magnitude at most 1, the largest at least 1/2, between 2^-100 and
    2^100.  It is a constant for derivatives.

    Args:
      x: Float32 or float64.
      axis: Axes of which the largest entry is taken; None for all.

    Returns:
      The powers, with axes of size 1 where ``axis`` was (none of them for None); 1 where all entries are 0 or one is
      not finite.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None))
    usable = (largest > 0) & jnp.isfinite(largest)
    exponent = jnp.frexp(jnp.where(usable, largest, 0.5))[1]
    exponent = jnp.clip(exponent, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return jnp.ldexp(jnp.ones_like(largest), exponent).astype(x.dtype)


def unit_vectors(x: jax.Array) -> jax.Array:
    """Normalizes vectors of any length.

    Args:
      x: ``[..., n]``, float32 or float64.

    Returns:
      ``[..., n]``; a zero vector stays zero, with gradient 0; one with a NaN is NaN.
    """
    x = x / binary_scale(x, -1)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    is_zero = square == 0
    return jnp.where(is_zero, 0, x / jnp.sqrt(jnp.where(is_zero, 1, square)))
