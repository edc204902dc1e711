"""The Walsh-Hadamard transform, in natural order."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# A Hadamard matrix of this many rows fills a matrix unit, and three of them reach two million entries.
_LARGEST_FACTOR = 7


def hadamard_matrix(size: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Sylvester's Hadamard matrix: ``H_1 = [1]``, ``H_2m = [[H, H], [H, -H]]``.

    Args:
      size: A power of two.
      dtype: Of the result.

    Returns:
      ``[size, size]`` of 1 and -1, symmetric; ``H H = size I``.

    Raises:
      ValueError: ``size`` is no power of two.
    """
    return jnp.asarray(_matrix(_log2("size", size)), dtype)


def fwht(x: jax.Array, axis: int = -1, normalized: bool = False) -> jax.Array:
    """Multiplies by :func:`hadamard_matrix` along one axis, in ``n log n`` operations.

    The axis is seen as one of up to 128 entries beside the others, several times over, and each is multiplied by a
    small Hadamard matrix: a pass over memory for each seven butterflies, and products that a matrix unit takes.  The
    matrix is symmetric, hence the transform its own transpose: gradients need nothing kept.

    Works under ``jax.jit``, ``jax.vmap`` and ``jax.grad``.

    Args:
      x: ``[..., n, ...]``, float32 or float64, n a power of two.
      axis: The axis of n.
      normalized: Whether to divide by ``sqrt(n)``, so that the transform is orthogonal and its own inverse.

    Returns:
      Like ``x``.

    Raises:
      ValueError: n is no power of two, or there is no such axis.
      TypeError: ``x`` is neither float32 nor float64.

    Examples:
      >>> import jax.numpy as jnp
      >>> fwht(jnp.array([1.0, 0, 1, 0, 0, 1, 1, 0])).tolist()
      [4.0, 2.0, 0.0, -2.0, 0.0, 2.0, 0.0, 2.0]
    """
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: expected one of the axes of shape {x.shape}, got {axis}")
    axis %= x.ndim
    n = x.shape[axis]
    bits = _log2(f"x: axis {axis}", n)
    passes = -(-bits // _LARGEST_FACTOR)
    # As even as can be: 2^8 is 16 x 16, and not 128 x 2.
    factors = [bits // passes + (i < bits % passes) for i in range(passes)]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    y, left = x, 1
    for factor in factors:
        width = 2**factor
        parts = y.reshape(*before, left, width, n // (left * width), *after)
        matrix = jnp.asarray(_matrix(factor), x.dtype)
        parts = jnp.tensordot(parts, matrix, axes=((axis + 1,), (0,)), precision=jax.lax.Precision.HIGHEST)
        y = jnp.moveaxis(parts, -1, axis + 1)
        left *= width
    y = y.reshape(x.shape)
    return y * np.asarray(n**-0.5, x.dtype) if normalized else y


def _log2(name: str, size: int) -> int:
    if size < 1 or size & (size - 1):
        raise ValueError(f"{name}: expected a power of two, got {size}")
    return size.bit_length() - 1


def _matrix(bits: int) -> np.ndarray:
    h = np.ones((1, 1), np.int8)
    for _ in range(bits):
        h = np.block([[h, h], [h, -h]])
    return h
