"""Layer, RMS and group normalization, computed in at least float32."""

import functools

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype

# The backward pass recomputes from the input, which is cheaper than storing three more arrays of its size.
_from_input = functools.partial(jax.checkpoint, prevent_cse=False)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, offset: bool = False) -> jax.Array:
    """Root mean square normalization over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    The quotient is rounded to the dtype of ``x`` before scaling, as in published models; with ``offset`` the product is
    rounded, as in those of Gemma.

    Args:
      x: ``[..., d]``, floating point.
      scale: ``[d]``.
      eps: Added to the mean square, inside the root.
      offset: Whether the factor is ``1 + scale`` instead of ``scale``.

    Returns:
      The shape and dtype of ``x``.
    """
    return _rms_norm(x, scale, eps, offset)


@functools.partial(_from_input, static_argnums=(2, 3))
def _rms_norm(x, scale, eps, offset):
    wide = x.astype(working_dtype(x))
    unit = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if offset:
        return (unit * (1 + _along_features(scale.astype(wide.dtype), x))).astype(x.dtype)
    return unit.astype(x.dtype) * _along_features(scale.astype(x.dtype), x)


@functools.partial(_from_input, static_argnums=3)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer normalization over the last axis (Ba et al., arXiv 1607.06450).

    Args:
      x: ``[..., d]``, floating point.
      scale: ``[d]``.
      bias: ``[d]``.
      eps: Added to the (biased) variance.

    Returns:
      The shape and dtype of ``x``.
    """
    wide = x.astype(working_dtype(x))
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    unit = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    scale, bias = (_along_features(p.astype(wide.dtype), x) for p in (scale, bias))
    return (unit * scale + bias).astype(x.dtype)


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, eps: float = 1e-5) -> jax.Array:
    """Group normalization over space and groups of channels (Wu and He, arXiv 1803.08494), in float32.

    Args:
      x: ``[batch, height, width, channels]``.
      scale: ``[channels]``.
      bias: ``[channels]``.
      groups: Number of groups; divides ``channels``.
      eps: Added to the variance.

    Returns:
      The shape and dtype of ``x``.

    Raises:
      ValueError: ``x`` does not have four axes, or ``groups`` does not divide its channels.
    """
    if x.ndim != 4 or groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"group_norm: expected x [batch, height, width, multiple of {groups}], got {x.shape}")
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    mean = jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
    variance = jnp.var(grouped, axis=(1, 2, 4), keepdims=True)
    y = ((grouped - mean) * jax.lax.rsqrt(variance + eps)).reshape(x.shape)
    channels = (1,) * (x.ndim - 1) + scale.shape
    return (y * scale.reshape(channels) + bias.reshape(channels)).astype(x.dtype)


def _along_features(parameter: jax.Array, x: jax.Array) -> jax.Array:
    return parameter.reshape((1,) * (x.ndim - 1) + parameter.shape)
