"""Gram matrices of the inputs of a linear layer, summed over batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg.products import gram


class GramState(NamedTuple):
    """Sums over inputs of a linear layer.

    Attributes:
      gram: ``X^T X [d1, d1]``, float32 or float64, uncentered.
      count: Number of inputs, float.
      absolute: Sums of ``|x| [d1]``.
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
        state.gram + gram(rows, rows), state.count + count, state.absolute + jnp.sum(jnp.abs(rows), axis=0)
    )
