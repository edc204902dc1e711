"""The public step: checks, scalars, shards, and the choice of the implementation."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax.kernels._dispatch import check_implementation, choose
from subspace_jax.kernels._shards import leading_axes, over_shards
from subspace_jax.kernels.projected_adam_step import mosaic_tpu, xla
from subspace_jax.kernels.projected_adam_step.arguments import AdamArrays

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float64)


def projected_adam_step(
    w: jax.Array,
    grad: jax.Array,
    basis: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    count: ArrayLike,
    learning_rate: ArrayLike,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    scale: ArrayLike = 1.0,
    weight_decay: ArrayLike = 0.0,
    side: str = "left",
    axis_name: str | Sequence[str] | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Updates a weight by Adam within a subspace: the step of GaLore and CoSO.

    With orthonormal columns P and ``t = count + 1``::

        R = P^T G                                          left;   R = G P, right
        mu <- b1 mu + (1 - b1) R,  nu <- b2 nu + (1 - b2) R^2
        N = mu / (sqrt(nu) + eps),  c = scale sqrt(1 - b2^t) / (1 - b1^t)
        W <- (W - learning_rate c P N) (1 - learning_rate weight_decay)      left;   N P^T, right

    ``eps`` is added outside the bias correction, as in the code of both methods; ``eps * sqrt(1 - b2**t)`` gives the
    step of ``optax.scale_by_adam``.  The function is for loops that replace weights: the difference that
    :func:`optax.apply_updates` needs would cost the memory traffic that the fusion saves.

    The update lies in the span of P to the rounding of W.  If G is bfloat16, R is a bfloat16 matmul with float32 sums,
    and so is P N if W is bfloat16; other matmuls have full float32 precision.

    Moments hold squares, as in Adam: if an entry of R is above 1e19 in float32, nu stays infinite and N is 0; below
    1e-19 nu is 0, and N is mu over ``eps``.

    Memory and time, for m x n weights and rank r: W, G and P are read once, mu and nu are read and written once, W is
    written once: ``m n (2 |W| + |G|) + 4 m r + 16 r n`` bytes, and 4 m n r FLOPs.  On TPUs R, N and the update are
    never written (XLA alone reads mu and nu twice, and on v6e copies W for the left side); on GPUs, and if ``block`` is
    given, strips of them are written, by default of 32 MiB or 1024 columns of the update, whichever is more (rows for
    the right side).  Donate w, mu and nu to the ``jit`` around the step to avoid copies.

    Sharded over Explicit mesh axes, columns (rows, for the right side) need no collective; sharded rows (columns) cost
    one sum of R over the devices, and use the reference.  The basis is gathered along its columns.  Under Auto axes
    the compiler partitions the reference in the same way, in strips for up to 32 shards of the axis that is not
    projected.  Leading axes are mapped over, and the step works under ``vmap``.

    Source: CoSO (arXiv 2505.11816, steps 3 and 4 of the method, by its code), GaLore (arXiv 2403.03507, algorithm 2).

    Args:
      w: Weights ``[..., m, n]``, float32, bfloat16 or float64.
      grad: Their gradient, of the same shape, any of these dtypes.
      basis: Orthonormal columns, ``[..., m, r]`` for the left side and ``[..., n, r]`` for the right, float32 or
        float64.
      mu: First moment, ``[..., r, n]`` for the left side and ``[..., m, r]`` for the right, float32 or float64.
      nu: Second moment, like ``mu``.
      count: Steps taken before this one since the moments were zero, an integer scalar.
      learning_rate: Scalar; like the scalars below it may be traced.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      scale: Factor of the update, GaLore's alpha.
      weight_decay: Decoupled decay, applied after the update.
      side: "left" to project the rows of the weight, "right" to project the columns.
      axis_name: Within ``shard_map``, mesh axes over which R is summed: those that shard the projected axis, and those
        over which ``grad`` is a partial sum, so that r n words are reduced instead of m n.
      implementation: None, "xla", "mosaic_tpu" (TPU) or "mosaic_tpu_interpret" (any platform, slow, for tests).
      block: Columns (rows, for the right side) per strip; None for a value by shape and dtype.

    Returns:
      New ``w``, ``mu`` and ``nu``, with the shapes and dtypes of the old ones.

    Raises:
      ValueError: Shapes do not match, an axis is empty, a scalar is out of range, or the implementation does not exist
        or is not supported.
      TypeError: A dtype is not supported, or ``count`` is no integer.
    """
    _check(w, grad, basis, mu, nu, side, block)
    count = jnp.asarray(count)
    if not jnp.issubdtype(count.dtype, jnp.integer) or count.ndim:
        raise TypeError(f"count: expected an integer scalar, got {count.dtype} of shape {count.shape}")
    for name, value in (("b1", b1), ("b2", b2)):
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"{name}: expected a decay in [0, 1), got {value}")
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    refusal = mosaic_tpu.refusal(w, basis, mu, side, block)
    if axes and refusal is None:
        refusal = "a sum over devices stands between its halves (axis_name)"
    check_implementation("projected_adam_step", implementation, refusal)
    scalars = _scalars(mu.dtype, count, (b1, b2), eps, learning_rate, scale, weight_decay)
    arrays = AdamArrays(w, grad, basis, mu, nu, scalars)
    return _step(arrays, side, axes, implementation if refusal is None else "xla", block)


def _check(w, grad, basis, mu, nu, side, block):
    if side not in ("left", "right"):
        raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(f"w: expected matrices [..., m, n] without empty axes, got shape {w.shape}")
    if grad.shape != w.shape:
        raise ValueError(f"grad: expected the shape of w, {w.shape}, got {grad.shape}")
    leading, (m, n) = w.shape[:-2], w.shape[-2:]
    projected = m if side == "left" else n
    if basis.ndim != w.ndim or basis.shape[:-1] != (*leading, projected) or not 1 <= basis.shape[-1] <= projected:
        wanted = (*leading, projected, "r")
        raise ValueError(f"basis: expected {wanted} with 1 <= r <= {projected} for side {side!r}, got {basis.shape}")
    rank = basis.shape[-1]
    wanted = (*leading, rank, n) if side == "left" else (*leading, m, rank)
    for name, x in (("mu", mu), ("nu", nu)):
        if x.shape != wanted:
            raise ValueError(f"{name}: expected shape {wanted} for side {side!r}, got {x.shape}")
        if x.dtype not in (jnp.float32, jnp.float64) or x.dtype != mu.dtype:
            raise TypeError(f"{name}: expected moments that are both float32 or both float64, got {x.dtype}")
    for name, x in (("w", w), ("grad", grad)):
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float32, bfloat16 or float64, got {x.dtype}")
    if basis.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"basis: expected float32 or float64, got {basis.dtype}")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block: expected a positive number of columns or rows, or None, got {block!r}")


def _scalars(dtype, count, decays, eps, learning_rate, scale, weight_decay):
    """Returns ``[1 - b1, 1 - b2, eps, learning_rate c, 1 - learning_rate weight_decay]``.

    ``1 - b`` of a Python float is computed in double precision, and ``1 - b^t`` without cancellation: in float32
    ``1 - 0.999`` would be wrong by 5e-5 of itself.
    """

    def number(x):
        return jnp.asarray(x).astype(dtype)

    rate1, rate2 = (number(1 - b) if isinstance(b, int | float) else 1 - number(b) for b in decays)
    t = number(count + 1)
    c = jnp.sqrt(-jnp.expm1(t * jnp.log1p(-rate2))) / -jnp.expm1(t * jnp.log1p(-rate1))
    lr = number(learning_rate)
    return jnp.stack([rate1, rate2, number(eps), lr * number(scale) * c, 1 - lr * number(weight_decay)])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _step(arrays: AdamArrays, side: str, axes: tuple[str, ...], implementation: str | None, block: int | None):
    projected = "m" if side == "left" else "n"
    lead = leading_axes(arrays.w, 2)
    small = "r n" if side == "left" else "m r"
    rule = "{0} m n, {0} m n, {0} {1} r, {0} {2}, {0} {2}, scalars -> {0} m n, {0} {2}, {0} {2}"

    def run(*args, **sharded):
        # Sharded rows need a sum over devices between the two sweeps of the kernel.
        summed = (*axes, *sharded[projected])

        def reference(*args):
            return xla.step(AdamArrays(*args), side=side, block=block, axes=summed)

        def kernel(*args, interpret):
            return mosaic_tpu.step(AdamArrays(*args), side=side, block=block, interpret=interpret)

        return choose("xla" if summed else implementation, reference, kernel, *args)

    rule = rule.format(lead, projected, small)
    return over_shards(run, rule, gathered=("r", "scalars"), inside=(projected,))(*_varying(arrays, axes))


def _varying(arrays: AdamArrays, axes: tuple[str, ...]) -> AdamArrays:
    """Within a ``shard_map`` that checks types, gives w, mu and nu the types of their new values."""

    def kinds(*args):
        return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))

    w, grad, basis, mu, nu, scalars = arrays
    moments = kinds(mu, nu, scalars) | (kinds(grad, basis) - set(axes))
    weights = kinds(w, basis) | moments

    def vary(x, wanted):
        missing = tuple(sorted(wanted - kinds(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return arrays._replace(w=vary(w, weights), mu=vary(mu, moments), nu=vary(nu, moments))
