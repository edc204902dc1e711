"""Full-precision matmuls.

Accelerators round a plain float32 matmul to bfloat16 or TF32, which would break orthonormality.
"""

import jax
import jax.numpy as jnp
import numpy as np


def working_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns the dtype of geometric computations: float32, or float64 if any array is."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def broadcast_leading(*arrays: jax.Array) -> list[jax.Array]:
    """Broadcasts the leading axes of matrices ``[..., m, n]`` of any sizes.

    Args:
      *arrays: Each with at least two axes.

    Returns:
      The arrays, unchanged if they have the common leading axes.

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
    """Returns ``x`` with NaN for infinite entries, for which LAPACK's SVD does not terminate."""
    return jnp.where(jnp.isfinite(x), x, jnp.nan)


def eye_like(m: jax.Array) -> jax.Array:
    """Returns identity matrices of the shape and dtype of ``m [..., k, k]``."""
    return jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape)
