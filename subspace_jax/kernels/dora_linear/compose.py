"""The compose step with a custom backward pass of few residuals.

There is no Pallas kernel: XLA fuses the step into one loop over its arguments on TPUs and GPUs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.kernels._dispatch import check_implementation

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
_NO_KERNEL = "it has no kernel, because XLA fuses it into one pass too"


def dora_compose(
    base: jax.Array, lora: jax.Array, g: jax.Array, scale: ArrayLike, *, implementation: str | None = None
) -> jax.Array:
    """Returns the DoRA update of a layer's output, ``(g - 1) base + g (s lora)``.

    This form is accurate for g near 1, where ``g (s lora + base) - base`` would cancel.  Arithmetic, g included, is
    float32 (float64 for a float64 argument) and rounded once, at the end.

    With d the gradient of the result: ``d_lora = g s d``, ``d_base = (g - 1) d``, ``d_g = sum (s lora + base) d`` over
    all but the last axis.  The residual is ``s lora + base``, in the dtype of ``base``, and only if g is trained.

    Memory: ``base`` and ``lora`` are read and the result is written, once each; the gradient reads d and writes two
    such arrays, and reads one more for d_g.

    Source: arXiv 2603.22276.

    Args:
      base: Output of the frozen layer, without bias, ``[..., out]``, float32, bfloat16, float16 or float64.
      lora: ``(x a) b``, of the same shape and dtype.
      g: Magnitude over norm, ``[out]``, float32 or float64; bfloat16 would lose the difference from 1.
      scale: Scalar s, which may be traced; it has no derivative.
      implementation: None or "xla".

    Returns:
      ``[..., out]`` in the dtype of ``base``.

    Raises:
      ValueError: Shapes do not match, or the implementation does not exist or is not supported.
      TypeError: A dtype is none of the above.
    """
    check_implementation("dora_compose", implementation, _NO_KERNEL)
    if base.ndim < 1 or lora.shape != base.shape:
        raise ValueError(f"lora: expected the shape of base, {base.shape}, got {lora.shape}")
    if g.shape != base.shape[-1:]:
        raise ValueError(f"g: expected one number for each output, {base.shape[-1:]}, got {g.shape}")
    if base.dtype not in _FLOATS or lora.dtype != base.dtype:
        raise TypeError(
            f"base, lora: expected both float32, bfloat16, float16 or float64, got {base.dtype} and {lora.dtype}"
        )
    if g.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"g: expected float32 or float64, got {g.dtype}")
    if jnp.shape(scale) != ():
        raise ValueError(f"scale: expected a scalar, got shape {jnp.shape(scale)}")
    return _composed(base, lora, g, scale)


@jax.jit
def _composed(base, lora, g, scale):
    return compose(base, lora, g, scale, 1.0)


def compose(base: jax.Array, lora: jax.Array, g: jax.Array, scale: ArrayLike, less: float) -> jax.Array:
    """Returns ``(g - less) base + g (s lora)``; with ``less = 0`` it is the output of the layer."""
    dtype = linalg.working_dtype(base, g)
    g = g.astype(dtype)[(None,) * (base.ndim - 1)]
    return _compose(base, lora, g, jax.lax.stop_gradient(jnp.asarray(scale, dtype)), less)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _compose(base, lora, g, scale, less):
    wide = base.astype(g.dtype)
    # For less = 0 as well: 1 base + (g - 1) base is base itself where g is 1, whatever else is rounded.
    out = (g - 1) * wide + g * (scale * lora.astype(g.dtype))
    return (out if less else wide + out).astype(base.dtype)


def _forward(base, lora, g, scale, less):
    g_is_trained = g.perturbed
    base, lora, g, scale = (x.value for x in (base, lora, g, scale))
    inner = (scale * lora.astype(g.dtype) + base.astype(g.dtype)).astype(base.dtype) if g_is_trained else None
    return _compose(base, lora, g, scale, less), (inner, g, scale)


def _backward(less, kept, d):
    inner, g, scale = kept
    if isinstance(d, jax.custom_derivatives.SymbolicZero):
        d = jnp.zeros(d.shape, d.dtype)
    wide = d.astype(g.dtype)
    d_base = ((g - less) * wide).astype(d.dtype)
    d_lora = ((g * scale) * wide).astype(d.dtype)
    every = tuple(range(d.ndim - 1))
    d_g = jnp.zeros_like(g) if inner is None else jnp.sum(inner.astype(g.dtype) * wide, axis=every, keepdims=True)
    return d_base, d_lora, d_g, jnp.zeros_like(scale)


_compose.defvjp(_forward, _backward, symbolic_zeros=True)
