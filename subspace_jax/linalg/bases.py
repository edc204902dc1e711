"""Random orthonormal bases, and the orthonormality error."""

import operator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.linalg.polar import polar_step
from subspace_jax.linalg.products import eye_like, gram, working_dtype
from subspace_jax.linalg.qr import positive_qr


def random_orthonormal(
    key: jax.Array, n: int, k: int, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws orthonormal bases uniformly (Haar): the Q factor of a Gaussian matrix, diagonal of R positive.

    Args:
      key: Random key.
      n: Dimension of the space.
      k: Dimension of the subspace.
      batch_shape: Leading axes.
      dtype: float32 or float64.

    Returns:
      ``[*batch_shape, n, k]``.

    Raises:
      ValueError: ``k`` is below 1 or above ``n``.
      TypeError: ``dtype`` is neither float32 nor float64.
    """
    n, k = operator.index(n), operator.index(k)
    if not 1 <= k <= n:
        raise ValueError(f"k: a subspace of R^{n} has 1 to {n} dimensions, got {k}")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise TypeError(f"dtype: bases stay orthonormal in float32 or float64, got {jnp.dtype(dtype)}")
    # The Newton step removes the rounding error of Householder QR, several times the least possible.
    return polar_step(positive_qr(jax.random.normal(key, (*batch_shape, n, k), dtype))[0])


def orthonormality_error(s: jax.Array) -> jax.Array:
    """Returns the Frobenius norm of ``S^T S - I``.

    Args:
      s: ``[..., n, k]``, floating point.

    Returns:
      ``[...]``, at least float32.

    Raises:
      ValueError: ``s`` has fewer than two axes.
      TypeError: ``s`` is not floating point.
    """
    if s.ndim < 2:
        raise ValueError(f"s: expected [..., n, k], got shape {s.shape}")
    if not jnp.issubdtype(s.dtype, jnp.floating):
        raise TypeError(f"s: expected floating point, got {s.dtype}")
    s = s.astype(working_dtype(s))
    product = gram(s, s)
    return jnp.linalg.norm(product - eye_like(product), axis=(-2, -1))
