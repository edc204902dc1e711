"""Checks of two feature matrices of the same examples."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype


def checked_pair(x: jax.Array, y: jax.Array, fewest: int) -> tuple[jax.Array, jax.Array]:
    """Returns both in a common dtype, float32 or float64; raises for what is no pair of feature matrices."""
    for name, z in (("x", x), ("y", y)):
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise TypeError(f"{name}: expected floating-point features, got {z.dtype}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or 0 in (*x.shape, *y.shape):
        raise ValueError(f"x, y: expected features of the same examples [n, p] and [n, q], got {x.shape} and {y.shape}")
    if x.shape[0] < fewest:
        raise ValueError(f"x, y: expected at least {fewest} examples, got {x.shape[0]}")
    for name, z in (("x", x), ("y", y)):
        known = not isinstance(z, jax.core.Tracer) and getattr(z, "is_fully_addressable", True)
        if known and not bool(jnp.all(jnp.isfinite(z))):
            raise ValueError(f"{name}: expected finite features, got NaN or infinity")
    dtype = working_dtype(x, y)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)
