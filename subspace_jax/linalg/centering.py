"""Columns without their means."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix


def centered_columns(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Subtracts the mean of each column.

    The mean of values far from 0 is rounded, so what it leaves is centered once more; a column that then varies by no
    more than the rounding of its entries is constant, and becomes 0.

    Args:
      x: ``[..., n, p]``, float32 or float64.

    Returns:
      The centered columns ``[..., n, p]`` and the means ``[..., p]``.

    Raises:
      ValueError: ``x`` is no matrix.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_matrix("x", x)
    mean = jnp.mean(x, axis=-2, keepdims=True)
    once = x - mean
    rest = jnp.mean(once, axis=-2, keepdims=True)
    twice = once - rest
    rounding = 4 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    # Not "<=": NaN must stay.
    constant = ~(jnp.max(jnp.abs(twice), axis=-2, keepdims=True) > rounding) & jnp.isfinite(rounding)
    return jnp.where(constant, 0, twice), (mean + rest)[..., 0, :]
