"""The factor of a Gram matrix that turns output errors into matrix norms."""

import jax
import jax.numpy as jnp
import numpy as np


def gram_factor(gram: jax.Array, damping: float = 1e-6) -> jax.Array:
    """Factors ``G + damping trace(G) / d1 I = L^T L``, so that ``||X D||_F = ||L D||_F`` for every ``D``.

    The damping makes up for inputs that span less than the whole space.  Use float64 for the activations of real
    networks, whose largest features would drown the smallest in float32.

    Args:
      gram: ``[d1, d1]``, symmetric positive semidefinite, float32 or float64.
      damping: Share of the mean eigenvalue that is added to all.

    Returns:
      ``L [d1, d1]``, upper triangular.

    Raises:
      ValueError: The matrix is not square; or, where it is not traced, not symmetric, not finite or 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> gram_factor(jnp.diag(jnp.array([4.0, 9.0])), damping=0.0).tolist()
      [[2.0, 0.0], [0.0, 3.0]]
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram: expected a square matrix [d1, d1], got shape {gram.shape}")
    if not isinstance(gram, jax.core.Tracer):
        _check_values(np.asarray(gram))
    shift = damping * jnp.trace(gram) / gram.shape[0]
    return jnp.linalg.cholesky(gram + shift * jnp.eye(gram.shape[0], dtype=gram.dtype)).T


def _check_values(gram: np.ndarray) -> None:
    if not np.isfinite(gram).all():
        raise ValueError("gram: expected finite values, got NaN or infinity")
    largest = np.abs(gram).max()
    if not largest:
        raise ValueError("gram: expected some inputs other than 0, got a matrix of zeros")
    if np.abs(gram - gram.T).max() > 1e-4 * largest:
        raise ValueError(
            f"gram: expected a symmetric matrix, differs from its transpose by {np.abs(gram - gram.T).max()}"
        )
