"""The component of hidden states in a subspace: penalised, or removed."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype


def decoupling_penalty(h: jax.Array, q: jax.Array, mask: jax.Array | None = None, squared: bool = False) -> jax.Array:
    """Mean length of the component of hidden states in a subspace, ``E ||q^T h||`` (arXiv 2508.12803).

    The projector ``q q^T [d, d]`` is never formed: ``2 k d`` FLOPs for each state.  ``q`` is a constant for
    derivatives.  The gradient of a state lies in the subspace, and has length ``1 / count`` (0 where the component is
    0).

    Args:
      h: Hidden states ``[..., d]``, floating point.
      q: Orthonormal basis ``[d, k]``; of no columns, or all zeros, for no penalty.
      mask: The states that count, ``[...]``: the last of the leading axes of ``h``, or all of them, as in a mask
        ``[batch, length]`` for states ``[layers, batch, length, d]``; 0 or False leaves out.  All by default.
      squared: Whether the square of the length is averaged.

    Returns:
      A scalar, float32 or wider, at least 0; 0 for an empty mask that is traced.

    Raises:
      ValueError: Shapes do not match, or no state counts.
    """
    _check_basis(h, q)
    lengths = _lengths(h, q, squared)
    if mask is None:
        return jnp.mean(lengths)
    if mask.shape != lengths.shape[lengths.ndim - mask.ndim :]:
        raise ValueError(f"mask: expected the last leading axes of h {h.shape}, got {mask.shape}")
    counts = mask.astype(bool)
    if not isinstance(counts, jax.core.Tracer) and not counts.any():
        raise ValueError(f"mask: expected at least one state that counts, got none of {mask.size}")
    counts = jnp.broadcast_to(counts.reshape((1,) * (lengths.ndim - mask.ndim) + mask.shape), lengths.shape)
    total = jnp.sum(jnp.where(counts, lengths, 0))
    return total / jnp.maximum(jnp.sum(counts), 1).astype(lengths.dtype)


def project_out(h: jax.Array, q: jax.Array) -> jax.Array:
    """Removes the component in a subspace, ``h - q q^T h``: the hard form of the penalty.

    Args:
      h: Hidden states ``[..., d]``, floating point.
      q: Orthonormal basis ``[d, k]``.

    Returns:
      ``[..., d]`` in the dtype of ``h``; computed in float32 or wider.

    Raises:
      ValueError: Shapes do not match.
    """
    _check_basis(h, q)
    dtype = working_dtype(h, q)
    q = q.astype(dtype)
    return (h.astype(dtype) - _product(_product(h.astype(dtype), q), q.T)).astype(h.dtype)


def _lengths(h: jax.Array, q: jax.Array, squared: bool) -> jax.Array:
    dtype = working_dtype(h, q)
    # The product in the dtype of the states, as a fused read of them; what is added up, in float32.
    component = jnp.matmul(h, jax.lax.stop_gradient(q).astype(h.dtype), preferred_element_type=dtype)
    square = jnp.sum(jnp.square(component), axis=-1)
    if squared:
        return square
    is_zero = square == 0  # where the root has no derivative
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def _product(x: jax.Array, m: jax.Array) -> jax.Array:
    return jnp.matmul(x, m, precision=jax.lax.Precision.HIGHEST)


def _check_basis(h: jax.Array, q: jax.Array) -> None:
    if q.ndim != 2 or h.ndim < 1 or h.shape[-1] != q.shape[0]:
        raise ValueError(f"h, q: expected states [..., d] and a basis [d, k], got {h.shape} and {q.shape}")
