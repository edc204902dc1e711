"""Sparse subspace clustering by orthogonal matching pursuit (SSC-OMP)."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.linalg import SparseRows
from subspace_jax.linalg.expression_rows import block_of, checked, without_own


def ssc_omp(
    x: jax.Array,
    nonzeros: int = 10,
    *,
    threshold: float = 1e-6,
    stop: str = "relative",
    block_size: int | None = None,
) -> SparseRows:
    """Represents each row by few others, chosen one by one (You, Robinson and Vidal, CVPR 2016).

    The row with the largest absolute inner product with the residual is added, and the coefficients of all that are
    chosen are fitted anew.  A step computes the products of a block of residuals with all rows; unlike Batch-OMP
    (:func:`subspace_jax.linalg.omp_gram`, for a dictionary of few atoms) it needs no ``[n, n]`` Gram matrix.

    Args:
      x: ``[n, features]``, floating point; rows of unit length as a rule.
      nonzeros: Rows to choose, at most.
      threshold: See ``stop``.
      stop: A row is done when its residual is below ``threshold`` times its length (``"relative"``), or when the
        squared residual is (``"toolbox"``, as the authors' code has it).
      block_size: Rows at a time.

    Returns:
      Coefficients ``[n, nonzeros]`` in the order of choice; 0 behind the last that was chosen.  Float32 or wider.

    Raises:
      ValueError: ``x`` is no matrix or (where its values are known) not finite, or another argument is out of range.
      TypeError: ``x`` is not floating point.
    """
    x = checked(x)
    n = x.shape[0]
    if not 1 <= nonzeros < n:
        raise ValueError(f"nonzeros: expected 1 to {n - 1}, one less than the number of rows, got {nonzeros}")
    if stop not in ("relative", "toolbox"):
        raise ValueError(f"stop: expected 'relative' or 'toolbox', got {stop!r}")

    def of_block(block):
        return _of_rows(*block, x, nonzeros, threshold, stop)

    ids = jnp.arange(n, dtype=jnp.int32)
    return linalg.map_row_blocks(of_block, (x, ids), block_of(n, block_size))


def _of_rows(own, at, x, nonzeros, threshold, stop):
    count, row = own.shape[0], jnp.arange(own.shape[0])
    length = jnp.linalg.norm(own, axis=1)
    slots = jnp.arange(nonzeros, dtype=jnp.int32)

    def step(t, carry):
        residual, chosen, active, values, size = carry
        scores = without_own(jnp.abs(linalg.times(residual, x.T)), at, -1.0)
        taken = jnp.where(slots[None] < jnp.asarray(t, jnp.int32), -2.0, jnp.inf).astype(scores.dtype)
        scores = scores.at[row[:, None], chosen].min(jnp.broadcast_to(taken, chosen.shape))
        chosen = chosen.at[:, t].set(jnp.where(active, jnp.argmax(scores, axis=1).astype(jnp.int32), chosen[:, t]))
        size = size + active.astype(jnp.int32)
        atoms = jnp.where((slots[None] < size[:, None])[..., None], x[chosen], 0)
        values = jnp.where(active[:, None], _least_squares(atoms, own), values)
        residual = own - _combined(values, atoms)
        square = jnp.sum(jnp.square(residual), axis=1)
        done = square < threshold * length if stop == "toolbox" else square < jnp.square(threshold * length)
        return residual, chosen, active & ~done, values, size

    zeros = jnp.zeros((count, nonzeros), x.dtype)
    start = (own, zeros.astype(jnp.int32), length > 0, zeros, jnp.zeros(count, jnp.int32))
    _, chosen, _, values, size = jax.lax.fori_loop(0, nonzeros, step, start)
    return SparseRows(chosen, jnp.where(slots[None] < size[:, None], values, 0))


def _combined(values, atoms):
    return jnp.einsum("bs,bsd->bd", values, atoms, precision=jax.lax.Precision.HIGHEST)


def _least_squares(atoms, own):
    """Coefficients ``[b, s]`` of ``own [b, d]`` by ``atoms [b, s, d]``, refined once; 0 for an atom of zeros."""
    products = jnp.einsum("bsd,btd->bst", atoms, atoms, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.diagonal(products, axis1=1, axis2=2)
    # Zero atoms get a diagonal of 1; nearly dependent ones a lift by rounding, which the refinement takes back.
    lift = jnp.where(diagonal > 0, diagonal * 8 * jnp.finfo(own.dtype).eps, 1)
    factor = jnp.linalg.cholesky(products + lift[:, :, None] * jnp.eye(atoms.shape[1], dtype=own.dtype)[None])

    def solve(target):
        right = jnp.einsum("bsd,bd->bs", atoms, target, precision=jax.lax.Precision.HIGHEST)[..., None]
        half = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)[..., 0]

    values = solve(own)
    return values + solve(own - _combined(values, atoms))
