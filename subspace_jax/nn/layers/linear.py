"""The one door through which every matrix product of a model goes.

A kernel is either an array ``[in, out]`` or a structured weight: any pytree that knows how to multiply.  A model that
calls :func:`linear` so serves dense weights, low-rank adapters and quantised bases alike, without knowing of them.
"""

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


@runtime_checkable
class StructuredKernel(Protocol):
    """What a weight must offer to stand in the place of a dense kernel."""

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

    The activations decide the dtype of the product: with bfloat16 ``x`` a float32 kernel is rounded on the way in,
    while the stored parameter stays float32.

    Args:
      x: Activations ``[..., in]``, floating point.
      kernel: Array ``[in, out]``, or a :class:`StructuredKernel`.
      bias: Array ``[out]``, or None.
      out_dtype: Type of the result, that of ``x`` by default.  A dense product is accumulated in it, so that float32
        logits of bfloat16 activations are not rounded; a structured one is cast.

    Returns:
      ``[..., out]`` in the dtype of ``x``, or in ``out_dtype``.

    Raises:
      ValueError: The last axis of ``x`` is not the first axis of an array kernel.
      TypeError: ``x`` is of integers or booleans.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"linear: x decides the dtype of the product; expected floating point, got {x.dtype}")
    if isinstance(kernel, StructuredKernel):
        y = kernel.linear(x)
        y = y if out_dtype is None else y.astype(out_dtype)
    else:
        if x.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"linear: x of shape {x.shape} has {x.shape[-1]} features, kernel {kernel.shape} takes "
                f"{kernel.shape[0]}"
            )
        y = _product(x, kernel.astype(x.dtype), out_dtype)
    if bias is None:
        return y
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def _product(x: jax.Array, kernel: jax.Array, out_dtype: DTypeLike | None) -> jax.Array:
    """``x @ kernel`` for ``x [..., in]`` and ``kernel [in, out]``."""
    if x.ndim < 3 or not _on_one_cpu():
        return jnp.matmul(x, kernel, preferred_element_type=out_dtype)
    *rows, width = x.shape
    y = jnp.matmul(x.reshape(math.prod(rows), width), kernel, preferred_element_type=out_dtype)
    return y.reshape(*rows, kernel.shape[1])


def _on_one_cpu() -> bool:
    """Whether there is nothing but one CPU.

    The gradient of a kernel sums over all leading axes of x.  Of more than one, XLA on a CPU first makes a transposed
    copy, which costs some percent of a training step; as one axis they would not be split over devices any more.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (mesh.empty or mesh.size == 1) and jax.device_count() == 1 and jax.default_backend() == "cpu"


class Linear(nnx.Module):
    """Affine map with logical axis names on its parameters.

    Args:
      in_features: Width of the input.
      out_features: Width of the output.
      axes: Logical names of the kernel's two axes; the bias takes the second.
      use_bias: Whether there is a bias.
      param_dtype: Type in which the parameters are stored.
      rngs: Source of randomness; its ``params`` stream is used.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        use_bias: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), axes=axes[1:]) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., in_features]`` to ``[..., out_features]``."""
        return linear(x, self.kernel.get_value(), None if self.bias is None else self.bias.get_value())
