"""Spatial pooling, channels last."""

import jax
import numpy as np


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
    """Largest value of each window; what is padded never wins.

    Args:
      x: ``[batch, height, width, channels]``, floating point.
      window: Side of the window.
      strides: Step in both directions.
      padding: Places added on each side.

    Returns:
      ``[batch, (height + 2 padding - window) // strides + 1, ..., channels]`` in the dtype of ``x``.
    """
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    lowest = np.array(-np.inf, x.dtype)
    return jax.lax.reduce_window(x, lowest, jax.lax.max, (1, window, window, 1), (1, strides, strides, 1), sides)


def halve(x: jax.Array) -> jax.Array:
    """Mean over cells of 2 x 2; the last cells of an odd side average the values that are there.

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
