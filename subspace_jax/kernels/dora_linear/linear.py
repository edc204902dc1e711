"""A linear layer with a DoRA adapter."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax.kernels._products import product
from subspace_jax.kernels.dora_linear.compose import compose
from subspace_jax.kernels.dora_weight_norm import dora_weight_norm
from subspace_jax.kernels.dora_weight_norm.api import check_factors, least_norm


def dora_linear(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    magnitude: jax.Array,
    scale: ArrayLike,
    bias: jax.Array | None = None,
    *,
    dropped: jax.Array | None = None,
    detach_norm: bool = True,
    energy: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Applies a frozen weight with a DoRA adapter: ``y = x (W + s a b) diag(magnitude / norm) + bias``.

    The norm is that of the adapted weight's columns, from :func:`dora_weight_norm`; neither pass allocates an array of
    the size of W.  If ``magnitude`` equals that norm, ``g = magnitude / norm`` is exactly 1, and a zero ``b`` leaves
    the output of the layer unchanged.  The norm is bounded below by 1e-12, by 1e-6 for 16-bit weights.

    Costs beside ``x W``: the norm, ``2 r in out`` FLOPs per call, for any number of tokens; ``2 r (in + out)`` per
    token; one pass over ``[tokens, out]``.  For inference use the merged weight.  The gradient of W, as large as W, is
    computed only if it is used.

    Source: arXiv 2402.09353 (equations 5, 6 and section 4.3), arXiv 2603.22276; order and dropout as in PEFT.

    Args:
      x: Activations ``[..., in]``, float32, bfloat16, float16 or float64.
      w: ``[in, out]``, rounded to the dtype of ``x`` in the matmul.
      a: ``[in, r]``.
      b: ``[r, out]``.
      magnitude: ``[out]``, float32 or float64, for any dtype of ``x``.
      scale: Scalar s, which may be traced; it has no derivative.
      bias: ``[out]``, not scaled by the magnitude.
      dropped: ``x`` after dropout, the input of the adapter and of the correction ``(g - 1) x W``, at the cost of a
        second matmul with W.  None without dropout.
      detach_norm: Whether the norm is a constant for derivatives, as in the published training.
      energy: See :func:`dora_weight_norm`.
      implementation: Of :func:`dora_weight_norm`.

    Returns:
      ``[..., out]`` in the dtype of ``x``.

    Raises:
      ValueError: Shapes do not match, or the implementation is not supported.
      TypeError: A dtype is not supported.
    """
    check_factors(w, a, b, scale)
    if w.ndim != 2:
        raise ValueError(f"w: expected [in, out], got {w.shape}; map over leading axes with jax.vmap")
    for name, given in (("x", x), ("dropped", dropped)):
        if given is None:
            continue
        if given.ndim < 1 or given.shape[-1] != w.shape[0]:
            raise ValueError(f"{name}: expected [..., {w.shape[0]}] for w {w.shape}, got {given.shape}")
        if given.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {given.dtype}")
    if dropped is not None and (dropped.shape, dropped.dtype) != (x.shape, x.dtype):
        raise ValueError(f"dropped: expected {x.dtype}{x.shape} like x, got {dropped.dtype}{dropped.shape}")
    for name, given in (("magnitude", magnitude), ("bias", bias)):
        if given is not None and given.shape != w.shape[1:]:
            raise ValueError(f"{name}: expected shape {w.shape[1:]} for w {w.shape}, got {given.shape}")
    if magnitude.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"magnitude: expected float32 or float64, got {magnitude.dtype}")
    norm = dora_weight_norm(w, a, b, scale, energy=energy, implementation=implementation)
    norm = jax.lax.stop_gradient(norm) if detach_norm else norm
    y = _linear(x, w, a, b, _gain(magnitude, norm, w.dtype), scale, dropped)
    return y if bias is None else y + bias.astype(y.dtype)[(None,) * (y.ndim - 1)]


@functools.partial(jax.jit, static_argnums=2)
def _gain(magnitude, norm, dtype):
    return magnitude.astype(norm.dtype) / jnp.maximum(norm, least_norm(dtype))


@jax.jit
def _linear(x, w, a, b, g, scale, dropped):
    base = product(x, w)
    if dropped is None:
        return compose(base, product(product(x, a), b), g, scale, 0.0)
    lora = product(product(dropped, a), b)
    return base + compose(product(dropped, w), lora, g, scale, 1.0)
