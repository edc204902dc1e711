"""Sparse coding: columns as combinations of few atoms of a dictionary."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_matrix
from subspace_jax.linalg.products import gram, times

_SEGMENT = 32


def omp(dictionary: jax.Array, y: jax.Array, sparsity: int, *, tile: int = 8192) -> tuple[jax.Array, jax.Array]:
    """Orthogonal matching pursuit with exactly ``sparsity`` atoms for each column.

    Atom by atom, the one that correlates most with the residual is chosen, and the column is projected onto all that
    are chosen (Pati, Rezaiifar and Krishnaprasad 1993).  As Batch-OMP (Rubinstein, Zibulevsky and Elad 2008) it works
    on ``D^T D`` and ``D^T Y`` alone; see :func:`omp_gram`.

    Args:
      dictionary: ``[d1, k]`` with columns of unit norm, float32 or float64.
      y: ``[d1, d2]`` of the same dtype.
      sparsity: Atoms of a column, ``s``.
      tile: Columns at a time; see :func:`omp_gram`.

    Returns:
      Coefficients and atoms, ``[s, d2]`` each, in the order of choice; the atoms of a column differ, int32.  A
      coefficient is 0 where the residual has vanished before.

    Raises:
      ValueError: ``sparsity`` is not between 1 and ``k``, or the shapes don't match.
      TypeError: The dtype is neither float32 nor float64.

    Examples:
      >>> import jax.numpy as jnp
      >>> values, atoms = omp(jnp.eye(3), jnp.array([[0.5], [-2.0], [1.0]]), 2)
      >>> values[:, 0].tolist(), atoms[:, 0].tolist()
      ([-2.0, 1.0], [1, 2])
    """
    check_matrix("dictionary", dictionary)
    check_matrix("y", y)
    if dictionary.ndim != 2 or y.ndim != 2 or dictionary.shape[0] != y.shape[0]:
        raise ValueError(
            f"dictionary, y: expected [d1, k] and [d1, d2], got {dictionary.shape} and {y.shape}; jax.vmap does several"
        )
    return omp_gram(gram(dictionary, dictionary), gram(dictionary, y), sparsity, tile=tile)


def omp_gram(
    atoms_gram: jax.Array, correlations: jax.Array, sparsity: int, *, tile: int = 8192
) -> tuple[jax.Array, jax.Array]:
    """Orthogonal matching pursuit from inner products.

    A column keeps the factor ``B [k, t]`` of a Cholesky decomposition of ``D^T D`` that is pivoted by its choices: the
    rows of its atoms are the Cholesky factor of their Gram matrix, and column ``t`` has the correlations of all atoms
    with the direction that atom ``t`` adds.  A step costs ``k t`` operations for each column and nothing depends on
    ``d1``.  An atom that depends on those chosen, to within rounding, gets the coefficient 0.

    Works under jit and vmap; columns may be sharded.

    Args:
      atoms_gram: ``D^T D [k, k]`` with a diagonal of ones.
      correlations: ``D^T Y [k, d2]``.
      sparsity: Atoms of a column, ``s``.
      tile: Columns at a time, which hold ``tile * s * k`` numbers.  A step reads most of them.

    Returns:
      See :func:`omp`.

    Raises:
      ValueError: ``sparsity`` is not between 1 and ``k``, ``tile`` is below 1, or the shapes don't match.
    """
    k, count = correlations.shape
    if atoms_gram.shape != (k, k):
        raise ValueError(f"atoms_gram: expected {(k, k)} for correlations {correlations.shape}, got {atoms_gram.shape}")
    if not 1 <= sparsity <= k:
        raise ValueError(f"sparsity: expected 1 to {k}, the number of atoms, got {sparsity}")
    if tile < 1:
        raise ValueError(f"tile: expected at least 1 column, got {tile}")
    rows = correlations.T
    if count <= tile:
        values, atoms = _tile(atoms_gram, rows, sparsity)
        return values.T, atoms.T
    tiles = -(-count // tile)
    padded = jnp.pad(rows, ((0, tiles * tile - count), (0, 0))).reshape(tiles, tile, k)
    found = jax.lax.map(lambda part: _tile(atoms_gram, part, sparsity), padded)
    values, atoms = (x.reshape(tiles * tile, sparsity)[:count].T for x in found)
    return values, atoms


def _tile(gram_: jax.Array, start: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    """Codes the columns whose correlations are the rows of ``start [c, k]``; returns ``[c, s]`` each."""
    count, k = start.shape
    dtype, column = start.dtype, jnp.arange(count)
    tiny = jnp.asarray(16 * jnp.finfo(dtype).eps, dtype)

    def step(t, carry):
        factor, left, chosen, atoms = carry
        atom = jnp.argmax(jnp.where(chosen, -1, jnp.abs(left)), axis=1).astype(jnp.int32)
        known = factor[column, :, atom]
        new = gram_[atom] - jnp.einsum("csk,cs->ck", factor, known, precision=jax.lax.Precision.HIGHEST)
        energy = new[column, atom]
        scale = jnp.where(energy > tiny, jax.lax.rsqrt(jnp.maximum(energy, tiny)), 0)
        new = new * scale[:, None]
        left = left - new * (left[column, atom] * scale)[:, None]
        factor = factor.at[:, t].set(new)
        return factor, left, chosen.at[column, atom].set(True), atoms.at[:, t].set(atom)

    factor = jnp.zeros((count, 0, k), dtype)
    carry = (factor, start, jnp.zeros((count, k), bool), jnp.zeros((count, s), jnp.int32))
    # A loop reads the whole factor, whatever has been filled: it grows by an eighth at a time.
    size = max(_SEGMENT, -(-s // 8))
    for first in range(0, s, size):
        last = min(first + size, s)
        grown = jnp.pad(carry[0], ((0, 0), (0, last - first), (0, 0)))
        carry = jax.lax.fori_loop(first, last, step, (grown, *carry[1:]))
    factor, _, _, atoms = carry
    # Lower triangular [c, s, s]; an atom that adds no direction has a row of zeros from the diagonal on.
    lower = jnp.swapaxes(jnp.take_along_axis(factor, atoms[:, None], axis=2), 1, 2)
    return _coefficients(gram_, start, lower, atoms), atoms


def _coefficients(gram_: jax.Array, start: jax.Array, lower: jax.Array, atoms: jax.Array) -> jax.Array:
    """Returns the least-squares coefficients ``[c, s]``, refined once by the residual that they leave."""
    spans = jnp.diagonal(lower, axis1=1, axis2=2) > 0
    ones = jnp.eye(lower.shape[1], dtype=bool)[None] & ~spans[:, None]
    lower = jnp.where(ones, 1, jnp.tril(lower))

    def solve(right):
        right = jnp.where(spans, right, 0)[..., None]
        half = jax.lax.linalg.triangular_solve(lower, right, left_side=True, lower=True)
        half = jnp.where(spans[..., None], half, 0)
        whole = jax.lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)
        return jnp.where(spans, whole[..., 0], 0)

    values = solve(jnp.take_along_axis(start, atoms, axis=1))
    left = start - times(densify(values.T, atoms.T, start.shape[1]).T, gram_)
    return values + solve(jnp.take_along_axis(left, atoms, axis=1))


def densify(values: jax.Array, indices: jax.Array, k: int) -> jax.Array:
    """Returns sparse columns as a matrix.

    Args:
      values: ``[s, d2]``, the entries of each column.
      indices: ``[s, d2]`` integers, their rows, which differ within a column.
      k: Number of rows.

    Returns:
      ``[k, d2]``.

    Raises:
      ValueError: The shapes differ.
    """
    if values.ndim != 2 or values.shape != indices.shape:
        raise ValueError(f"values, indices: expected [s, d2] both, got {values.shape} and {indices.shape}")
    columns = jnp.broadcast_to(jnp.arange(values.shape[1]), values.shape)
    return jnp.zeros((k, values.shape[1]), values.dtype).at[indices, columns].set(values, unique_indices=True)


def code_error(dictionary: jax.Array, y: jax.Array, s: jax.Array) -> jax.Array:
    """Returns the Frobenius norm of ``y - dictionary @ s`` for dense coefficients ``s [k, d2]``."""
    return jnp.linalg.norm(y - times(dictionary, s))
