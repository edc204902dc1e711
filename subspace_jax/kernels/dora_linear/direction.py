"""The product with the adapted weight before it is brought to its lengths, and those lengths, in one go."""

import jax
import jax.numpy as jnp

from subspace_jax.kernels._shards import over_shards, vary_alike
from subspace_jax.kernels.dora_weight_norm import formed
from subspace_jax.kernels.dora_weight_norm import xla as norms
from subspace_jax.kernels.lora_linear import api as lora
from subspace_jax.kernels.lora_linear import xla


def direction_and_norm(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns ``x (W + s a b)`` and the norms ``[out]`` of its columns, which are constant for derivatives.

    All arrays are of one type, float32 or float64.  Gradients are those of :func:`lora_linear`.
    """
    scale = jax.lax.stop_gradient(jnp.asarray(scale, x.dtype))
    y, squares = _both(*vary_alike(x, w, a, b, scale))
    return y, jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(squares, 0)))


@jax.custom_vjp
def _both(x, w, a, b, scale):
    rows = " ".join(f"row{i}" for i in range(x.ndim - 1))
    rule = f"{rows} i, i o, i r, r o, -> {rows} o, o"
    return over_shards(_run, rule, together=("r",), inside=("i", *rows.split()))(x, w, a, b, scale)


def _run(*args, i, **rows):
    del rows  # every device that holds some of them has all the norms

    def at_once(x, w, a, b, scale):
        v = formed.adapted(w, a, b, scale)
        out = jnp.matmul(x, v, precision=jax.lax.Precision.HIGHEST), formed.squares(v)
        return jax.lax.psum(out, i) if i else out

    def apart(x, w, a, b, scale):
        y = xla.apart(x, w, a, b, scale)
        return jax.lax.psum(y, i) if i else y, norms.squares(w, a, b, scale, budget=None, axes=i)

    return jax.lax.platform_dependent(*args, cpu=at_once, default=apart)


def _forward(x, w, a, b, scale):
    return _both(x, w, a, b, scale), (x, w, a, b, scale)


def _backward(kept, d):
    return lora.backward(kept, d[0])


_both.defvjp(_forward, _backward)
