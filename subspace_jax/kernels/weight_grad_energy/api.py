"""The public function: checks and shards."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from subspace_jax.kernels._dispatch import check_implementation
from subspace_jax.kernels._shards import over_shards
from subspace_jax.kernels.weight_grad_energy import xla

_NO_KERNEL = "it has no kernel, because what XLA compiles for TPUs writes no gradient either"


def weight_grad_energy(
    x: jax.Array,
    dy: jax.Array,
    *,
    axis_name: str | Sequence[str] | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Row and column energies of a weight's gradient ``G = x^T dy``, without the gradient.

    What AdaPreLoRA (arXiv 2605.08734) takes as second moments of a frozen weight's gradient: ``sum_j G_ij^2`` and
    ``sum_i G_ij^2``.

    For t tokens: ``2 t in out`` FLOPs, those of the gradient itself.  ``x`` and ``dy`` are read, and ``in + out``
    numbers are written.  On TPUs G is in registers only; elsewhere 16 MiB of it are there at a time.

    Energies are those of the gradient of all tokens: where tokens are split over devices, parts of G are summed over
    them before they are squared, ``4 in out`` bytes on the network.  (The mean of the devices' own energies is another
    statistic, with the noise of each added.)  Under Explicit axes that is done here, and under Auto axes by the
    compiler; within ``shard_map``, name the axes in ``axis_name``.  Features that are split stay so, and each energy is
    summed over the devices that split the other.  Works under ``vmap``.  Results are constants for derivatives.

    Args:
      x: Inputs of the layer ``[..., tokens, in]``, float32, bfloat16, float16 or float64; leading axes are those of the
        weight.
      dy: Gradient of its outputs ``[..., tokens, out]``, of the same dtype.
      axis_name: Within ``shard_map``, the mesh axes that split tokens.
      implementation: None or "xla".
      block: Rows of G that are worked on at a time; None for a value by shape, or all on TPUs.

    Returns:
      ``[..., in]`` and ``[..., out]``, float32, or float64 if the arguments are.  They are squares: float32 holds those
      of gradients whose entries lie between 1e-19 and 1e19, and those of smaller ones are 0.

    Raises:
      ValueError: Shapes don't fit together, an axis is empty, or the implementation doesn't exist or can't serve.
      TypeError: A dtype is none of the above, or the two differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from subspace_jax import kernels
      >>> rows, columns = kernels.weight_grad_energy(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))
      >>> [float(e) for e in (*rows, *columns)]
      [9.0, 36.0, 45.0]
    """
    _check(x, dy, block)
    check_implementation("weight_grad_energy", implementation, x, refusal=_NO_KERNEL)
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
