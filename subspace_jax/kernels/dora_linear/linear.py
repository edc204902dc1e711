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

    The norm is that of the adapted weight's columns, from :func:`dora_weight_norm`, and neither pass makes an array of
    the size of W.  Where ``magnitude`` is that norm, ``g = magnitude / norm`` is exactly 1 and a zero ``b`` leaves the
    output of the layer as it is.  The norm is bounded below by 1e-12, by 1e-6 for 16-bit weights:
    columns shorter than that do not get their magnitudes.

    Costs beside ``x W``: the norm, ``2 r in out`` FLOPs in each call, whatever the number of tokens; ``2 r (in + out)``
    for each token; one pass over ``[tokens, out]``.  Where nothing trains, keep the norm, and apply the merged weight.
    The gradient of W, as large as W, is made only where it is asked for.

    Source: arXiv 2402.09353 (equations 5, 6 and section 4.3), arXiv 2603.22276; order and dropout as in PEFT.

    Args:
      x: Activations ``[..., in]``, float32, bfloat16, float16 or float64.
      w: ``[in, out]``, rounded to the dtype of ``x`` where it meets it.
      a: ``[in, r]``.
      b: ``[r, out]``.
      magnitude: ``[out]``, float32 or float64, whatever the dtype of ``x``.
      scale: Scalar s, which may be traced; it has no derivative.
      bias: ``[out]``, not scaled by the magnitude.
      dropped: ``x`` after dropout, while training with it: the adapter, and with it the correction ``(g - 1) x W``,
        then see this, for the price of a second product with W.
      detach_norm: Whether the norm is a constant for derivatives, as in the published training.
      energy: See :func:`dora_weight_norm`.
      implementation: Of :func:`dora_weight_norm`.

    Returns:
      ``[..., out]`` in the dtype of ``x``.

    Raises:
      ValueError: Shapes don't fit together, or the implementation can't serve.
      TypeError: A dtype can't serve.
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
    return _linear(x, w, a, b, magnitude, norm, scale, bias, dropped, detach_norm)


@functools.partial(jax.jit, static_argnums=9)
def _linear(x, w, a, b, magnitude, norm, scale, bias, dropped, detach_norm):
    norm = jax.lax.stop_gradient(norm) if detach_norm else norm
    g = magnitude.astype(norm.dtype) / jnp.maximum(norm, least_norm(w.dtype))
    base = product(x, w)
    if dropped is None:
        y = compose(base, product(product(x, a), b), g, scale, 0.0)
    else:
        lora = product(product(dropped, a), b)
        y = base + compose(product(dropped, w), lora, g, scale, 1.0)
    return y if bias is None else y + bias.astype(y.dtype)[(None,) * (y.ndim - 1)]
