"""The public function: checks and shards."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from subspace_jax.kernels._dispatch import check_implementation
from subspace_jax.kernels._shards import over_shards
from subspace_jax.kernels.weight_grad_energy import xla

_NO_KERNEL = "it has no kernel, because XLA writes no gradient on TPUs either"


def weight_grad_energy(
    x: jax.Array,
    dy: jax.Array,
    *,
    axis_name: str | Sequence[str] | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Row and column energies of a weight's gradient ``G = x^T dy``, without the gradient.

    The second moments of a frozen weight's gradient in AdaPreLoRA (arXiv 2605.08734): ``sum_j G_ij^2`` and
    ``sum_i G_ij^2``.

    For t tokens: ``2 t in out`` FLOPs, those of the gradient itself.  ``x`` and ``dy`` are read, and ``in + out``
    elements are written.  On TPUs G exists in registers only; elsewhere 16 MiB of it at a time.

    Energies are those of the gradient of all tokens: if tokens are sharded, parts of G are summed over the devices
    before they are squared, ``4 in out`` bytes on the network.  (The mean of per-device energies is another, noisier
    statistic.)  Under Explicit axes this function does so, and under Auto axes the compiler; within ``shard_map``, pass
    the axes in ``axis_name``.  Sharded features stay sharded, and each energy is summed over the devices that shard the
    other axis.  Works under ``vmap``.  Results are constants for derivatives.

    Args:
      x: Inputs of the layer ``[..., tokens, in]``, float32, bfloat16, float16 or float64; leading axes are those of the
        weight.
      dy: Gradient of its outputs ``[..., tokens, out]``, of the same dtype.
      axis_name: Within ``shard_map``, the mesh axes that shard tokens.
      implementation: None or "xla".
      block: Rows of G at a time; None for a value by shape, or all on TPUs.

    Returns:
      ``[..., in]`` and ``[..., out]``, float32, or float64 if the arguments are.  They are squares: entries of G
      between 1e-19 and 1e19 are in the range of float32; smaller ones give 0.

    Raises:
      ValueError: Shapes do not match, an axis is empty, or the implementation does not exist or is not supported.
      TypeError: A dtype is not supported, or the two differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from subspace_jax import kernels
      >>> rows, columns = kernels.weight_grad_energy(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))
      >>> [float(e) for e in (*rows, *columns)]
      [9.0, 36.0, 45.0]
    """
    _check(x, dy, block)
    check_implementation("weight_grad_energy", implementation, _NO_KERNEL)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    return _energies(x, dy, axes, block)


def _check(x, dy, block):
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(f"x: expected [..., tokens, in] without empty axes, got shape {x.shape}")
    if dy.ndim != x.ndim or dy.shape[:-1] != x.shape[:-1] or not dy.shape[-1]:
        wanted = ", ".join(map(str, (*x.shape[:-1], "out")))
        raise ValueError(f"dy: expected [{wanted}] for x {x.shape}, got shape {dy.shape}")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if dy.dtype != x.dtype:
        raise TypeError(f"dy: expected the dtype of x, {x.dtype}, got {dy.dtype}")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block: expected a positive number of rows, or None, got {block!r}")


@functools.partial(jax.jit, static_argnums=(2, 3))
def _energies(x, dy, axes, block):
    x, dy = jax.lax.stop_gradient((x, dy))

    def call(x, dy):
        def run(x, dy, t):
            return xla.energies(x, dy, axes=(*axes, *t), block=block)

        return over_shards(run, "t i, t o -> i, o", inside=("t",))(x, dy)

    for _ in x.shape[:-2]:
        call = jax.vmap(call)
    return call(x, dy)
