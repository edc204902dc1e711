"""Leading eigenpairs of a symmetric operator that is known by its products alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.linalg.orthonormal import orthonormal_columns
from subspace_jax.linalg.products import gram, times
from subspace_jax.linalg.svd import canonical_signs

_DEGREE = 12
_MAX_ROUNDS = 100


class Eigenpairs(NamedTuple):
    """Eigenpairs of a symmetric operator.

    Attributes:
      values: ``[k]``, descending.
      vectors: ``[n, k]``, orthonormal, of canonical signs.
      residual: ``[]``, the largest norm of ``A v - value v``.
      products: ``[]`` int32, products of the operator with a block of vectors.
    """

    values: jax.Array
    vectors: jax.Array
    residual: jax.Array
    products: jax.Array


def top_eigenpairs(
    key: jax.Array,
    matvec: Callable[[jax.Array], jax.Array],
    n: int,
    k: int,
    *,
    lowest: float = -1.0,
    tolerance: float | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Eigenpairs:
    """The eigenpairs of largest eigenvalue, by block subspace iteration with Chebyshev filters.

    A round applies a Chebyshev polynomial of degree 12 that is small between ``lowest`` and the smallest Ritz value of
    the block and grows beyond, orthonormalizes, and takes Ritz pairs (Zhou, Saad, Tiago and Chelikowsky, J. Comput.
    Phys. 219, 2006).  It finds eigenvalues of any multiplicity up to the width of the block, ``k`` and half as many
    again, at least 8.  Beside the products of the operator there are only narrow ones; the rows of the vectors may be
    sharded.

    Args:
      key: Key of the start.
      matvec: Returns ``A v`` for ``v [n, p]``; ``A`` is symmetric.
      n: Rows of ``A``.
      k: Number of eigenpairs.
      lowest: A number that is no larger than any eigenvalue.
      tolerance: Largest norm of a residual, relative to the largest eigenvalue in magnitude; 1e-5 in float32 and 1e-10
        in float64 by default.
      dtype: float32 or float64.

    Returns:
      The eigenpairs.  Look at ``residual`` where 100 rounds may not do.

    Raises:
      ValueError: ``k`` is not between 1 and ``n``.
      TypeError: ``dtype`` is neither float32 nor float64.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of rows, got {k}")
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    if tolerance is None:
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-10
    start = orthonormal_columns(jax.random.normal(key, (n, min(n, k + max(8, k // 2))), dtype))
    values, vectors, residual = _ritz(matvec, start, k)

    def going(carry):
        values, _, residual, rounds = carry
        return (residual > tolerance * jnp.max(jnp.abs(values))) & (rounds < _MAX_ROUNDS)

    def one(carry):
        values, vectors, _, rounds = carry
        filtered = _filter(matvec, vectors, jnp.asarray(lowest, dtype), values[-1], values[0])
        return *_ritz(matvec, orthonormal_columns(filtered), k), rounds + 1

    values, vectors, residual, rounds = jax.lax.while_loop(going, one, (values, vectors, residual, jnp.int32(0)))
    vectors = vectors[:, :k]
    return Eigenpairs(values[:k], vectors * canonical_signs(vectors)[None], residual, (_DEGREE + 1) * rounds + 1)


def _ritz(matvec, basis, k):
    """Ritz values, descending, and vectors of a basis; and the largest residual of the first ``k``."""
    image = matvec(basis)
    small = gram(basis, image)
    values, rotation = jnp.linalg.eigh((small + small.T) / 2)
    values, rotation = values[::-1], rotation[:, ::-1]
    vectors = times(basis, rotation)
    left = times(image, rotation[:, :k]) - vectors[:, :k] * values[None, :k]
    return values, vectors, jnp.max(jnp.linalg.norm(left, axis=0))


def _filter(matvec, x, low, cut, high):
    """Applies the Chebyshev polynomial of ``[low, cut]``, scaled so as not to overflow at ``high``."""
    tiny = jnp.asarray(1e-3, x.dtype)
    cut = jnp.maximum(cut, low + tiny * jnp.maximum(high - low, tiny))
    center, half = (cut + low) / 2, (cut - low) / 2
    first = half / jnp.maximum(high - center, half)
    y = (matvec(x) - center * x) * (first / half)

    def step(_, carry):
        x, y, scale = carry
        new = 1 / (2 / first - scale)
        return y, 2 * (new / half) * (matvec(y) - center * y) - scale * new * x, new

    return jax.lax.fori_loop(1, _DEGREE, step, (x, y, first))[1]
