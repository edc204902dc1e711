"""Matrix products that keep what is orthonormal orthonormal.

Accelerators round a plain float32 product to bfloat16 or TF32; these ask for full precision.
"""

import jax
import jax.numpy as jnp
import numpy as np


def working_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns the dtype in which geometry is computed: at least float32, float64 if any array is."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def broadcast_leading(*arrays: jax.Array) -> list[jax.Array]:
    """Gives matrices ``[..., m, n]`` of any sizes the same leading axes.

    Args:
      *arrays: Each with at least two axes.

    Returns:
      The arrays, those that had the common leading axes untouched.

    Raises:
      ValueError: The leading axes can't be broadcast together.
    """
    leading = np.broadcast_shapes(*(x.shape[:-2] for x in arrays))
    shapes = [(*leading, *x.shape[-2:]) for x in arrays]
    return [x if x.shape == shape else jnp.broadcast_to(x, shape) for x, shape in zip(arrays, shapes, strict=True)]


def gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns ``x^T y`` for ``x [..., n, p]`` and ``y [..., n, q]``, as ``[..., p, q]`` in full precision."""
    return jnp.einsum("...np,...nq->...pq", x, y, precision=jax.lax.Precision.HIGHEST)


def times(x: jax.Array, m: jax.Array) -> jax.Array:
    """Returns ``x m`` for ``x [..., n, p]`` and ``m [..., p, q]``, as ``[..., n, q]`` in full precision."""
    return jnp.matmul(x, m, precision=jax.lax.Precision.HIGHEST)


def nan_for_infinite(x: jax.Array) -> jax.Array:
    """Returns ``x`` with NaN for entries that are infinite, on which LAPACK's SVD does not end."""
    return jnp.where(jnp.isfinite(x), x, jnp.nan)


def eye_like(m: jax.Array) -> jax.Array:
    """Returns identity matrices of the shape and dtype of ``m [..., k, k]``."""
    return jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape)
