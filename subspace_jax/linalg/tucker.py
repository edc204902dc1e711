"""Tucker decomposition: a core tensor and a factor per axis."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from subspace_jax.linalg.products import working_dtype
from subspace_jax.linalg.svd import canonical_svd


def tucker_product(core: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """Multiplies a core by a factor along each of its last axes.

    ``T[a_0, a_1, ...] = sum_j core[j_0, j_1, ...] prod_i factors[i][a_i, j_i]``, one axis after the other, in full
    precision.

    Args:
      core: ``[..., r_0, r_1, ...]``, floating point.
      factors: For each axis ``[..., d_i, r_i]``, with the leading axes of the core, or none.

    Returns:
      ``[..., d_0, d_1, ...]``, float32, or float64 if any argument is.

    Raises:
      ValueError: A factor does not match its axis, or there are more factors than axes.
    """
    order = len(factors)
    if not 1 <= order <= core.ndim:
        raise ValueError(f"factors: expected 1 to {core.ndim} for a core {core.shape}, got {order}")
    dtype = working_dtype(core, *factors)
    tensor = core.astype(dtype)
    for i, factor in enumerate(factors):
        axis = core.ndim - order + i
        if factor.ndim < 2 or factor.shape[-1] != core.shape[axis]:
            raise ValueError(f"factors[{i}]: expected [..., d, {core.shape[axis]}], got {factor.shape}")
        moved = jnp.moveaxis(tensor, axis, -1)
        # The other axes become rows, so that leading axes are those of a batch of matmuls.
        lead = core.shape[: core.ndim - order]
        rows = moved.reshape(*lead, -1, moved.shape[-1])
        product = jnp.matmul(rows, jnp.swapaxes(factor, -1, -2).astype(dtype), precision=jax.lax.Precision.HIGHEST)
        tensor = jnp.moveaxis(product.reshape(*moved.shape[:-1], -1), -1, axis)
    return tensor


def hosvd(tensor: jax.Array, ranks: Sequence[int]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Compresses a tensor along every axis: the leading left singular vectors of each unfolding, and the core.

    Exact if each rank is that of the unfolding; otherwise within ``sqrt(order)`` of the best (De Lathauwer, De
    Moor, Vandewalle, A multilinear singular value decomposition, SIAM J. Matrix Anal. Appl. 21, 2000).  For set-up:
    it takes one SVD per axis.

    Args:
      tensor: ``[d_0, d_1, ...]``, floating point.
      ranks: One for each axis, from 1 to its size.

    Returns:
      The core ``[r_0, r_1, ...]``, and factors ``[d_i, r_i]`` with orthonormal columns, for :func:`tucker_product`.

    Raises:
      ValueError: Ranks do not match the axes.
    """
    if len(ranks) != tensor.ndim:
        raise ValueError(f"ranks: expected one for each axis of {tensor.shape}, got {tuple(ranks)}")
    for axis, (rank, size) in enumerate(zip(ranks, tensor.shape, strict=True)):
        if not 1 <= rank <= size:
            raise ValueError(f"ranks: expected 1 to {size} for axis {axis}, got {rank}")
    tensor = tensor.astype(working_dtype(tensor))
    factors = []
    for axis, rank in enumerate(ranks):
        unfolded = jnp.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
        # As wide as tall at least, so that there are vectors for any rank up to the size of the axis.
        short = max(0, unfolded.shape[0] - unfolded.shape[1])
        unfolded = jnp.pad(unfolded, ((0, 0), (0, short)))
        factors.append(canonical_svd(unfolded)[0][:, :rank])
    return tucker_product(tensor, [factor.T for factor in factors]), tuple(factors)
