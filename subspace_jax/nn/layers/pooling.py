"""Max and average pooling of images, channels last, and the mean over tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import working_dtype


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
    """Max pooling; padding is ignored.

    Args:
      x: ``[batch, height, width, channels]``, floating point.
      window: Side of the window.
      strides: Stride in both directions.
      padding: Padding on each side.

    Returns:
      ``[batch, (height + 2 padding - window) // strides + 1, ..., channels]`` in the dtype of ``x``.
    """
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    lowest = np.array(-np.inf, x.dtype)
    return jax.lax.reduce_window(x, lowest, jax.lax.max, (1, window, window, 1), (1, strides, strides, 1), sides)


def halve(x: jax.Array) -> jax.Array:
    """Average pooling over 2 x 2 with stride 2; the last window of an odd side averages the values inside.

    Args:
      x: ``[batch, height, width, channels]``, floating point.

    Returns:
      ``[batch, ceil(height / 2), ceil(width / 2), channels]`` in the dtype of ``x``.
    """
    height, width = x.shape[1:3]
    sides = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    sums = jax.lax.reduce_window(x, np.array(0, x.dtype), jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), sides)
    rows, columns = (np.minimum(2, n - np.arange(0, n, 2)) for n in (height, width))
    return sums * np.asarray(1 / np.outer(rows, columns), x.dtype)[None, :, :, None]


def mean_pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the states of a text's tokens, as in sentence-transformers.

    Args:
      states: ``[batch, length, d]``, floating point.
      mask: ``[batch, length]``, zero for padding, whose states are ignored.

    Returns:
      ``[batch, d]``, in at least float32; zeros for a text without tokens.
    """
    counted = mask.astype(bool)[..., None]
    kept = jnp.where(counted, states.astype(working_dtype(states)), 0)
    return jnp.sum(kept, axis=1) / jnp.maximum(jnp.sum(counted, axis=1, dtype=kept.dtype), 1)
