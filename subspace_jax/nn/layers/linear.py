"""Matmuls with dense or structured kernels; every linear map of a model calls :func:`linear`.

A kernel is an array ``[in, out]`` or a structured weight, a pytree with a ``linear`` method.  A model that calls
:func:`linear` thus runs with dense weights, low-rank adapters and quantized weights.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@runtime_checkable
class StructuredKernel(Protocol):
    """The protocol of weights that replace a dense kernel."""

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W`` for ``x`` of shape ``[..., in]``, as ``[..., out]`` in the dtype of ``x``."""


def linear(
    x: jax.Array,
    kernel: jax.Array | StructuredKernel,
    bias: jax.Array | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Returns ``x @ kernel + bias``.

    The kernel is cast to the dtype of ``x``; the stored parameter keeps its own.

    Args:
      x: Activations ``[..., in]``, floating point.
      kernel: Array ``[in, out]``, or a :class:`StructuredKernel`.
      bias: Array ``[out]``, or None.
      out_dtype: Dtype of the result, that of ``x`` by default.  A dense matmul accumulates in it; the result of a
        structured kernel is cast.

    Returns:
      ``[..., out]`` in the dtype of ``x``, or in ``out_dtype``.

    Raises:
      ValueError: The last axis of ``x`` is not the first axis of an array kernel.
      TypeError: ``x`` is not floating point.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"linear: expected floating-point x, got {x.dtype}")
    if isinstance(kernel, StructuredKernel):
        y = kernel.linear(x)
        y = y if out_dtype is None else y.astype(out_dtype)
    else:
        if x.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"linear: x of shape {x.shape} has {x.shape[-1]} features, kernel {kernel.shape} takes "
                f"{kernel.shape[0]}"
            )
        y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)
    if bias is None:
        return y
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
