"""Statistics of a layer's inputs, summed over batches, and the factor that turns output errors into matrix norms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg


class GramState(NamedTuple):
    """Sums over calibration inputs of a linear layer.

    Attributes:
      gram: ``X^T X [d1, d1]``, float32 or float64, uncentered.
      count: Number of inputs, float.
      absolute: Sums of ``|x| [d1]``, for ASVD.
    """

    gram: jax.Array
    count: jax.Array
    absolute: jax.Array

    @classmethod
    def zeros(cls, d1: int, dtype=jnp.float32) -> "GramState":
        """Returns the sums over no inputs."""
        return cls(jnp.zeros((d1, d1), dtype), jnp.zeros((), dtype), jnp.zeros((d1,), dtype))


def update_gram(state: GramState, x: jax.Array, weights: jax.Array | None = None) -> GramState:
    """Adds inputs; under jit sharded ones give the same sums, by one reduction over the mesh.

    Args:
      state: The sums so far.
      x: ``[..., d1]``, floating point; products are accumulated in the dtype of the state.
      weights: ``[...]``, 0 for inputs that do not count, such as padding, else 1; None counts all.

    Returns:
      The new sums.

    Raises:
      ValueError: The width differs, or ``x`` is not finite (where it is not traced).
    """
    width, dtype = state.gram.shape[0], state.gram.dtype
    if x.shape[-1] != width:
        raise ValueError(f"x: expected inputs [..., {width}], got shape {x.shape}")
    if not isinstance(x, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(x))):
        raise ValueError("x: expected finite calibration inputs, got NaN or infinity")
    rows = x.reshape(-1, width).astype(dtype)
    count = jnp.asarray(rows.shape[0], dtype)
    if weights is not None:
        weights = weights.reshape(-1).astype(dtype)
        rows, count = jnp.where(weights[:, None] > 0, rows, 0), jnp.sum(weights)
    return GramState(
        state.gram + linalg.gram(rows, rows), state.count + count, state.absolute + jnp.sum(jnp.abs(rows), axis=0)
    )


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
