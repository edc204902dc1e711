"""Singular values and vectors of a weight that is read in blocks of rows.

Products with the weight are JAX's; factorizations, which are narrow, are NumPy's in float64 on the host.  The host
loops over blocks, so nothing here is to be traced.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from subspace_jax import linalg

EXACT = 1024  # smaller sides up to this width are decomposed exactly
_HELD = 2**26  # entries of a matrix that is in memory as a whole: 256 MiB in float32
_BLOCK = 2**21  # entries of a block of rows of a larger one


class Rows(NamedTuple):
    """A matrix ``[m, n]`` in blocks of rows.

    Attributes:
      shape: ``(m, n)``.
      read: Function of start and stop that returns these rows, float32.
      step: Rows of a block.
    """

    shape: tuple[int, int]
    read: Callable[[int, int], ArrayLike]
    step: int

    def blocks(self) -> Iterator[tuple[slice, jax.Array]]:
        """Reads the blocks in order, each with its rows."""
        for start in range(0, self.shape[0], self.step):
            rows = slice(start, min(start + self.step, self.shape[0]))
            yield rows, jnp.asarray(self.read(rows.start, rows.stop), jnp.float32)

    @property
    def side(self) -> str:
        """The smaller side: "left", of the rows, or "right", of the columns."""
        return "right" if self.shape[0] >= self.shape[1] else "left"


class Decomposition(NamedTuple):
    """Leading singular values and vectors.

    Attributes:
      s: ``[r]`` float64, descending.
      left: ``[m, k]`` float32, orthonormal columns.
      right: ``[n, k]``.  Of the smaller side all ``r`` vectors are there, of the other those asked for.
      complete: Whether all singular values but zeros are there, and exact up to rounding.
    """

    s: np.ndarray
    left: np.ndarray
    right: np.ndarray
    complete: bool

    def leading(self, count: int) -> "Decomposition":
        """The first vectors of each side."""
        return self._replace(left=self.left[:, :count], right=self.right[:, :count])


def block_rows(shape: tuple[int, int]) -> int:
    """Rows of a block of a matrix of this shape: all where it is small enough to be held in memory."""
    return shape[0] if math.prod(shape) <= _HELD else max(1, _BLOCK // shape[1])


def as_rows(matrix: ArrayLike | Rows) -> Rows:
    """Returns an array as one block; of :class:`Rows` with a single block, that block is kept.

    Raises:
      ValueError: An array is no matrix, empty, or holds NaN or infinity.
    """
    if isinstance(matrix, Rows):
        if matrix.step < matrix.shape[0]:
            return matrix
        return _held(jnp.asarray(matrix.read(0, matrix.shape[0]), jnp.float32))
    x = jnp.asarray(matrix)
    if x.ndim != 2 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"matrix: expected floating point [m, n], got {x.dtype} {list(x.shape)}")
    x = x.astype(jnp.float32)
    if not bool(jnp.isfinite(x).all()):
        raise ValueError("matrix: expected finite values, got NaN or infinity")
    return _held(x)


def _held(x: jax.Array) -> Rows:
    return Rows(x.shape, lambda start, stop: x[start:stop] if stop - start < len(x) else x, len(x))


_times, _gram = jax.jit(linalg.times), jax.jit(linalg.gram)
_normal = jax.jit(lambda x, r: linalg.gram(x, linalg.times(x, r)))
_outer = jax.jit(lambda x, r: linalg.times(x, linalg.gram(x, r)))


def _image(matrix: Rows, small: np.ndarray) -> np.ndarray:
    """Maps vectors of the smaller side, ``[d, k]``, to the other one."""
    if matrix.side == "right":
        return np.concatenate([np.asarray(_times(x, small)) for _, x in matrix.blocks()])
    return sum(np.asarray(_gram(x, small[rows])) for rows, x in matrix.blocks())


def small_gram(matrix: Rows, small: np.ndarray) -> np.ndarray:
    """Multiplies vectors of the smaller side by the Gram matrix of that side, ``[d, k]`` float32."""
    small = np.asarray(small, np.float32)
    if matrix.side == "right":
        return sum(np.asarray(_normal(x, small)) for _, x in matrix.blocks())
    if matrix.step >= matrix.shape[0]:
        ((_, x),) = matrix.blocks()
        return np.asarray(_outer(x, small))
    middle = _image(matrix, small)
    return np.concatenate([np.asarray(_times(x, middle)) for _, x in matrix.blocks()])


def _energies(matrix: Rows, basis: np.ndarray | None) -> np.ndarray:
    """Gram matrix of the smaller side, whole or within an orthonormal basis; float64, for accurate small values."""
    if matrix.side == "right":
        total = 0.0
        for _, x in matrix.blocks():
            image = np.asarray(x if basis is None else _times(x, basis), np.float64)
            total = total + image.T @ image
        return total
    if basis is None:
        basis = np.eye(matrix.shape[0], dtype=np.float32)
    image = np.asarray(_image(matrix, basis), np.float64)
    return image.T @ image


def _orthonormal(x: np.ndarray) -> np.ndarray:
    """Orthonormal columns by Householder reflections, with the signs of the columns."""
    q, r = np.linalg.qr(x)
    return (q * np.where(np.diagonal(r) < 0, -1, 1)).astype(np.float32)


def _krylov(matrix: Rows, block: int, steps: int, seed: int) -> np.ndarray:
    """Orthonormal basis ``[d, block * steps]`` of powers of the Gram matrix, from the first, times a random block."""
    side = min(matrix.shape)
    found = np.zeros((side, 0), np.float32)
    now = np.random.default_rng(seed).standard_normal((side, block)).astype(np.float32)
    for _ in range(steps):
        now = small_gram(matrix, now)
        for _ in range(2 if found.shape[1] else 0):
            now = now - found @ (found.T @ now)
        now = _orthonormal(now)
        found = np.concatenate([found, now], axis=1)
    return _orthonormal(found)


def decompose(
    matrix: ArrayLike | Rows, keep: int, *, block: int, steps: int, seed: int = 0, exact: int = EXACT
) -> Decomposition:
    """Leading singular values and vectors, exact where the smaller side is narrow, else by a block Krylov method.

    The Krylov space is spanned by ``(W^T W)^i R``, ``i = 1 ... steps``, for a Gaussian block ``R`` on the smaller side
    (Musco and Musco, arXiv 1504.05477); singular values are those of the matrix restricted to it, so never above the
    true ones.

    Args:
      matrix: ``[m, n]``.
      keep: Vectors of the larger side; at most ``min(m, n)`` and the width of the space.
      block: Columns of the random block.
      steps: Number of products with the Gram matrix.
      seed: Seed of the block.
      exact: Largest width of the smaller side that is decomposed exactly; so is one no wider than the Krylov space.

    Returns:
      The decomposition.
    """
    matrix = as_rows(matrix)
    side = min(matrix.shape)
    complete = side <= max(exact, block * steps)
    basis = None if complete else _krylov(matrix, block, steps, seed)
    values, vectors = np.linalg.eigh(_energies(matrix, basis))
    s = np.sqrt(np.maximum(values[::-1], 0.0))
    small = vectors[:, ::-1].astype(np.float32)
    small = small if basis is None else basis @ small
    large = _orthonormal(_image(matrix, np.ascontiguousarray(small[:, :keep])))
    left, right = (small, large) if matrix.side == "left" else (large, small)
    return Decomposition(s, left, right, complete)


def decompose_product(left: ArrayLike, right: ArrayLike) -> Decomposition:
    """Singular values and vectors of ``left @ right``, without forming it.

    Args:
      left: ``[m, r]``.
      right: ``[r, n]``.

    Returns:
      All of the at most ``r`` triplets.
    """
    (ql, rl), (qr, rr) = (np.linalg.qr(np.asarray(x, np.float64)) for x in (left, np.asarray(right).T))
    u, s, vt = np.linalg.svd(rl @ rr.T, full_matrices=False)
    return Decomposition(s, (ql @ u).astype(np.float32), (qr @ vt.T).astype(np.float32), True)
