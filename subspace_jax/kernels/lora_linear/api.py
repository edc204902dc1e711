"""The public function: checks, derivatives, shards, and the choice of the form."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.kernels._dispatch import check_implementation, choose
from subspace_jax.kernels._shards import leading_axes, over_shards, sharded_like, vary_alike
from subspace_jax.kernels.lora_linear import xla

_NO_KERNEL = "it has no kernel, because XLA computes one matmul on TPUs"
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def lora_linear(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: ArrayLike,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Applies a frozen weight with a low-rank update, ``x w + s (x a) b``.

    On a TPU, in a program for one device, within ``shard_map`` or on Explicit mesh axes, this is one matmul over
    ``in + r`` that writes the result once and adds the update before rounding.  Elsewhere the update is a second
    matmul, added to the first.

    With d the gradient of the result, ``dx = d w^T + s (d b^T) a^T`` (one matmul over ``out + r`` in the same way,
    without a copy of w), ``da = s x^T (d b^T)``, ``db = s (x a)^T d``.  ``dw = x^T d``, as large as w, is computed only
    if it is used.  The residuals are the arguments.

    For t tokens: ``2 t (in out + r in + r out)`` FLOPs in the forward pass, as many for dx, and ``4 t r (in + out)``
    for the factors.  Memory traffic of at least ``t in + in out + t out + r (in + out)`` elements; x is read a second
    time, for ``x a``.

    Sharded over Explicit mesh axes, tokens and out need no collective in the forward pass; a sharded in costs one sum
    of the result.  dx is summed over devices that shard out, da and db over those that shard tokens.  The rank is
    gathered.  Under Auto axes the compiler does the same.  Works under ``vmap``, over weights too.

    Source: arXiv 2106.09685; ``s = alpha / r``, or ``alpha / sqrt(r)`` (arXiv 2312.03732).

    Args:
      x: Activations ``[..., in]``, float32, bfloat16, float16 or float64.  Their dtype is that of the matmuls: 16-bit
        types take one pass of the matrix unit and sum in float32, others keep full precision.
      w: ``[in, out]``, or ``[*lead, in, out]`` for several weights; x is then ``[*lead, ..., in]``, and so for a, b.
        Weights and factors are rounded to the dtype of x.
      a: ``[in, r]``.
      b: ``[r, out]``.
      scale: Scalar s, which may be traced; it has no derivative.
      implementation: None or "xla".

    Returns:
      ``[..., out]`` in the dtype of x.

    Raises:
      ValueError: Shapes do not match, an axis is empty, or the implementation does not exist or is not supported.
      TypeError: A dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from subspace_jax import kernels
      >>> x, w, a, b = jnp.ones((1, 2)), jnp.eye(2), jnp.ones((2, 1)), jnp.array([[0.0, 1.0]])
      >>> [float(y) for y in kernels.lora_linear(x, w, a, b, 0.5)[0]]
      [1.0, 2.0]
    """
    _check(x, w, a, b, scale)
    check_implementation("lora_linear", implementation, _NO_KERNEL)
    return _lora_linear(x, w, a, b, jnp.asarray(scale, linalg.working_dtype(x)))


def _check(x, w, a, b, scale):
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(f"w: expected [..., in, out] without empty axes, got shape {w.shape}")
    lead, (rows, columns) = w.shape[:-2], w.shape[-2:]
    if x.ndim < len(lead) + 1 or x.shape[: len(lead)] != lead or x.shape[-1] != rows:
        wanted = ", ".join(map(str, (*lead, "...", rows)))
        raise ValueError(f"x: expected [{wanted}] for w {w.shape}, got shape {x.shape}")
    if a.ndim != w.ndim or a.shape[:-1] != (*lead, rows) or a.shape[-1] < 1:
        raise ValueError(f"a: expected {(*lead, rows, 'r')} with r >= 1 for w {w.shape}, got {a.shape}")
    if b.shape != (*lead, a.shape[-1], columns):
        raise ValueError(f"b: expected {(*lead, a.shape[-1], columns)} for w {w.shape} and a {a.shape}, got {b.shape}")
    for name, array in (("x", x), ("w", w), ("a", a), ("b", b)):
        if array.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {array.dtype}")
    if jnp.shape(scale) != ():
        raise ValueError(f"scale: expected a scalar, got shape {jnp.shape(scale)}")


@jax.jit
def _lora_linear(x, w, a, b, scale):
    w, a, b = (y.astype(x.dtype) for y in (w, a, b))
    call = _apply
    for _ in w.shape[:-2]:
        call = jax.vmap(call, (0, 0, 0, 0, None))
    return call(*vary_alike(x, w, a, b, jax.lax.stop_gradient(scale)))


@jax.custom_vjp
def _apply(x, w, a, b, scale):
    rows = leading_axes(x, 1)
    return _over_shards(xla.apart, xla.joined, f"{rows} i, i o, i r, r o, -> {rows} o")(x, w, a, b, scale)


def _forward(x, w, a, b, scale):
    return _apply(x, w, a, b, scale), (x, w, a, b, scale)


def _backward(kept, d):
    x, w, a, b, scale = kept
    rows = leading_axes(x, 1)
    back = _over_shards(xla.apart_back, xla.joined_back, f"{rows} o, i o, i r, r o, -> {rows} i")
    factors = over_shards(xla.factor_gradients, f"{rows} i, i r, r o, {rows} o, -> i r, r o", gathered=("r",))
    dx = back(d, w, a, b, scale)
    da, db = factors(x, a, b, d, scale)
    dw = over_shards(xla.over_rows, f"{rows} i, {rows} o -> i o")(x, d)
    return *map(sharded_like, (dx, dw, da, db), (x, w, a, b)), jnp.zeros_like(scale)


_apply.defvjp(_forward, _backward)


def _over_shards(apart, joined, rule):
    def run(*args):
        # Joined on a TPU whose program is not partitioned along the contracted axis: where a kernel would run.
        return choose(None, apart, lambda *args, interpret: joined(*args), *args)

    return over_shards(run, rule, gathered=("r",))
