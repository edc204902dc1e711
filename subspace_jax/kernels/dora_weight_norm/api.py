"""The public norm: checks, shards and derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.kernels._dispatch import check_implementation
from subspace_jax.kernels._shards import leading_axes, over_shards, sharded_like, vary_alike
from subspace_jax.kernels.dora_weight_norm import xla
from subspace_jax.kernels.dora_weight_norm.chunks import check_budget

_NO_KERNEL = "it has no kernel, because what XLA compiles for TPUs reads the weight once and writes norms only"
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
_FACTORS = (jnp.float32, jnp.bfloat16, jnp.float64)


def dora_weight_norm(
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: ArrayLike,
    *,
    energy: jax.Array | None = None,
    budget_bytes: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Norm of each output column of an adapted weight, ``||W_j + s (a b)_j||``, without the weight.

    With ``e`` the squared norms of W's columns, in this order::

        n^2 = (e + 2 s sum_r b * (a^T W)) + s^2 sum_r b * (a^T a) b

    If n^2 is below 1e-4 e the sum has cancelled, and columns are computed from ``W + s a b``, 8 MiB of rows at a time;
    that branch runs only if some column needs it (under ``vmap`` always: give stacked weights leading axes instead).
    TPUs compute every column from ``W + s a b``, in one pass over W, with the adapted weight in registers only;
    ``energy`` and ``budget_bytes`` have no effect there.

    Columns whose squares are out of the range of float32 are scaled and computed again from ``W + s a b`` (so is a
    column of zeros), except on TPUs, where norms are valid between 1e-17 and 1e19.

    For in x out weights and rank r: ``2 r (in out + r in + r out)`` FLOPs; on TPUs ``2 r in out``.  ``W, a, b`` are
    read once (W twice without ``energy``), and ``a^T W``, ``4 r out`` bytes, is the largest temporary: 12.6 MB at
    8192 x 8192, r = 384; there is none on TPUs.  bfloat16 is never copied as float32 on GPUs; where matmuls do so,
    ``budget_bytes`` bounds the copies.

    Sharded over Explicit mesh axes, output columns need no collective; sharded rows cost one sum over devices, of
    ``[out]`` on TPUs and of ``[r, out]`` elsewhere.  The rank is gathered.  Under Auto axes the compiler does the same.

    Derivatives are those of the norm itself, factored as well.  DoRA trains with a constant norm
    (``jax.lax.stop_gradient``), the default of :func:`dora_linear`.  ``scale`` and ``energy`` have none.

    Source: arXiv 2603.22276 (factored norm), arXiv 2402.09353 (DoRA).

    Args:
      w: Weights ``[..., in, out]``, float32, bfloat16, float16 or float64.
      a: ``[..., in, r]``, float32, bfloat16 or float64.
      b: ``[..., r, out]``, float32, bfloat16 or float64.
      scale: Scalar s, which may be traced.
      energy: ``[..., out]``, from :func:`column_energy`, constant as W while an adapter trains.
      budget_bytes: Bytes for copies in float32, at least 16 MiB: W is processed in chunks of
        :func:`norm_chunk_size` rows.  None for all rows at once.
      implementation: None or "xla".

    Returns:
      ``[..., out]``, float32, or float64 if any argument is.

    Raises:
      ValueError: Shapes do not match, an axis is empty, the budget is out of range, or the implementation does not
        exist or is not supported.
      TypeError: A dtype is not supported.

    Examples:
      >>> import jax.numpy as jnp
      >>> from subspace_jax import kernels
      >>> w, a, b = jnp.eye(2), jnp.ones((2, 1)), jnp.array([[0.0, 1.0]])
      >>> [round(float(n), 4) for n in kernels.dora_weight_norm(w, a, b, 2.0)]
      [1.0, 3.6056]
    """
    check_factors(w, a, b, scale)
    if energy is not None and energy.shape != (*w.shape[:-2], w.shape[-1]):
        raise ValueError(f"energy: expected shape {(*w.shape[:-2], w.shape[-1])} for w {w.shape}, got {energy.shape}")
    if budget_bytes is not None:
        check_budget(budget_bytes)
    check_implementation("dora_weight_norm", implementation, _NO_KERNEL)
    scale = jnp.asarray(scale, linalg.working_dtype(w, a, b))
    return _norm(w, a, b, scale, energy, budget_bytes)


def column_energy(w: jax.Array) -> jax.Array:
    """Returns the squared norms of the columns of a weight, to be computed once for a frozen weight.

    Args:
      w: ``[..., in, out]``, float32, bfloat16, float16 or float64.

    Returns:
      ``[..., out]``, float32, or float64 if ``w`` is; 0 or infinite for norms that are not between 1e-19 and 1e19.
    """
    _check_weight("w", w)
    return xla.column_energy(w)


def least_norm(dtype: jnp.dtype) -> float:
    """Returns the lower bound of the norm that magnitudes are divided by, for weights of a dtype."""
    return 1e-6 if jnp.dtype(dtype).itemsize == 2 else 1e-12


def check_factors(w: jax.Array, a: jax.Array, b: jax.Array, scale: ArrayLike) -> None:
    """Raises unless shapes and dtypes of ``w [..., in, out]``, ``a [..., in, r]``, ``b [..., r, out]`` match."""
    _check_weight("w", w)
    lead, (rows, columns) = w.shape[:-2], w.shape[-2:]
    if a.ndim != w.ndim or a.shape[:-1] != (*lead, rows) or a.shape[-1] < 1:
        raise ValueError(f"a: expected {(*lead, rows, 'r')} with r >= 1 for w {w.shape}, got {a.shape}")
    if b.shape != (*lead, a.shape[-1], columns):
        raise ValueError(f"b: expected {(*lead, a.shape[-1], columns)} for w {w.shape} and a {a.shape}, got {b.shape}")
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in _FACTORS:
            raise TypeError(f"{name}: expected float32, bfloat16 or float64, got {x.dtype}")
    if jnp.shape(scale) != ():
        raise ValueError(f"scale: expected a scalar, got shape {jnp.shape(scale)}")


def _check_weight(name: str, w: jax.Array) -> None:
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(f"{name}: expected weights [..., in, out] without empty axes, got shape {w.shape}")
    if w.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {w.dtype}")


@functools.partial(jax.jit, static_argnums=5)
def _norm(w, a, b, scale, energy, budget):
    scale, energy = jax.lax.stop_gradient((scale, energy))
    args = (w, a, b, scale) if energy is None else (w, a, b, scale, energy)
    return _norms(*vary_alike(*args), *([None] if energy is None else []), budget)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _norms(w, a, b, scale, energy, budget):
    lead = leading_axes(w, 2)
    rule = f"{lead} i o, {lead} i r, {lead} r o, " + ("" if energy is None else f", {lead} o") + f" -> {lead} o"
    args = (w, a, b, scale) if energy is None else (w, a, b, scale, energy)

    def run(*args, i):
        return xla.norms(*args, budget=budget, axes=i)

    return over_shards(run, rule, gathered=("r",), inside=("i",))(*args)


def _forward(w, a, b, scale, energy, budget):
    norm = _norms(w, a, b, scale, energy, budget)
    return norm, (w, a, b, scale, energy, norm)


def _backward(budget, kept, weights):
    del budget
    w, a, b, scale, energy, norm = kept
    lead = leading_axes(w, 2)
    rule = f"{lead} i o, {lead} i r, {lead} r o, , {lead} o, {lead} o -> {lead} i o, {lead} i r, {lead} r o"
    # The gradient of a column of zeros is zero.
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
    run = over_shards(xla.gradients, rule, gathered=("r",))
    dw, da, db = map(sharded_like, run(w, a, b, scale, inverse, weights), (w, a, b))
    return dw, da, db, jnp.zeros_like(scale), None if energy is None else jnp.zeros_like(energy)


_norms.defvjp(_forward, _backward)
