"""Normalisation over the feature axis, computed in float32 whatever the activations are."""

import functools

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype

# The backward pass starts from the input again: arithmetic on what is at hand is cheaper than writing and reading
# three more arrays of the input's size.
_from_input = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(_from_input, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divides by the root mean square and scales (Zhang and Sennrich, arXiv 1910.07467).

    The quotient is rounded to the dtype of ``x`` before it is scaled, as the checkpoints were trained.

    Args:
      x: ``[..., d]``, floating point.
      scale: ``[d]``.
      eps: Added to the mean square, inside the root.

    Returns:
      The shape and dtype of ``x``.
    """
    wide = x.astype(working_dtype(x))
    unit = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return unit.astype(x.dtype) * _along_features(scale.astype(x.dtype), x)


@functools.partial(_from_input, static_argnums=3)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Normalises to mean 0 and variance 1, scales and shifts (Ba et al., arXiv 1607.06450).

    Args:
      x: ``[..., d]``, floating point.
      scale: ``[d]``.
      bias: ``[d]``.
      eps: Added to the (biased) variance.

    Returns:
      The shape and dtype of ``x``.
    """
    wide = x.astype(working_dtype(x))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scale, bias = (_along_features(p.astype(wide.dtype), x) for p in (scale, bias))
    return (unit * scale + bias).astype(x.dtype)


def _along_features(parameter: jax.Array, x: jax.Array) -> jax.Array:
    return parameter.reshape((1,) * (x.ndim - 1) + parameter.shape)
