"""A stored weight and what an update makes of it: a second stored weight, or low-rank factors."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from subspace_jax.interop import StoredTensor
from subspace_jax.interpret.inspector.core import rounding_floor
from subspace_jax.interpret.inspector.matrix import Decomposition, Rows, block_rows, decompose_product

_SCANNED = 2**22  # entries that are scanned at once
_HIDDEN = {"float64": 24, "float32": 24, "float16": 11, "bfloat16": 8}  # significant bits; float64 is read as float32


class Scan(NamedTuple):
    """What one pass over a change gives.

    Attributes:
      base_norm: Frobenius norm of the base.
      norm: Frobenius norm of the update.
      noise: Bound on the singular values that rounding of the stored weights makes, see :func:`rounding_floor`.
    """

    base_norm: float
    norm: float
    noise: float


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of a tensor as a matrix: the first axis, and the others together; a vector is a row."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def read_rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor as a matrix, float32, or float64 where it is stored so.

    Raises:
      ValueError: There is NaN or infinity in them; file, tensor and the first position are named.
    """
    index = (slice(start, stop),) if len(tensor.shape) > 1 else ()
    shape = (stop - start, matrix_shape(tensor.shape)[1])
    rows = np.asarray(tensor.read(index)).reshape(shape)
    rows = rows if rows.dtype == np.float64 else rows.astype(np.float32)
    # The sum is not finite where an entry is not: far quicker than looking at each.
    with np.errstate(over="ignore", invalid="ignore"):
        total = rows.sum(dtype=np.float64)
    if not np.isfinite(total) and not (finite := np.isfinite(rows)).all():
        row, column = np.argwhere(~finite)[0]
        where = [start + int(row), int(column)] if len(tensor.shape) > 1 else [int(column)]
        raise ValueError(
            f"{tensor.file}: {tensor.name}: expected finite weights, got {rows[row, column]} at {where}"
            f"{' of ' + str(list(matrix_shape(tensor.shape))) if len(tensor.shape) > 2 else ''}"
        )
    return rows


def _slices(shape: tuple[int, int], entries: int) -> Iterator[tuple[int, int]]:
    step = max(1, entries // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _rounding_variance(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Variance of the rounding error of each entry: a twelfth of its squared spacing, in units of the spacing at 1."""
    rows = rows.astype(np.float32)
    # The exponent alone: the power of two at or below each entry.
    power = (rows.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    return np.square(power) * np.float32(4.0 ** (1 - _HIDDEN[str(dtype)]) / 12)


class _Dense:
    """Changes whose rows are read; a subclass has ``base`` and ``tuned_rows``."""

    base: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        return matrix_shape(self.base.shape)

    def base_matrix(self) -> Rows:
        """The base weight."""
        return self._rows(lambda a, b: read_rows(self.base, a, b))

    def tuned_matrix(self) -> Rows:
        """The tuned weight."""
        return self._rows(self.tuned_rows)

    def delta_matrix(self) -> Rows | Decomposition:
        """The update."""
        return self._rows(lambda a, b: self.tuned_rows(a, b) - read_rows(self.base, a, b))

    def _rows(self, read) -> Rows:
        return Rows(self.shape, lambda a, b: np.asarray(read(a, b), np.float32), block_rows(self.shape))

    def _scan_rows(self, dtypes: tuple[np.dtype, ...]) -> Scan:
        base = norm = coarse = 0.0
        row_variances, column_variances = [], np.zeros(self.shape[1])
        for start, stop in _slices(self.shape, _SCANNED):
            old, new = read_rows(self.base, start, stop), self.tuned_rows(start, stop)
            base += float(np.sum(np.square(old), dtype=np.float64))
            difference = new - old
            norm += float(np.sum(np.square(difference), dtype=np.float64))
            variance = sum(_rounding_variance(x, dtype) for x, dtype in zip((old, new), dtypes, strict=True))
            row_variances.append(variance.sum(axis=1, dtype=np.float64))
            column_variances += variance.sum(axis=0, dtype=np.float64)
            # A change of up to one and a half spacings: the variance is a sixth of the squared spacing.
            coarse += float(np.sum(variance, where=np.square(difference) <= 13.5 * variance, dtype=np.float64))
        floor = rounding_floor(np.concatenate(row_variances), column_variances, coarse)
        return Scan(math.sqrt(base), math.sqrt(norm), floor)


@dataclass(frozen=True)
class StoredChange(_Dense):
    """Two stored weights.

    Attributes:
      base: The base.
      tuned: The tuned weight, of the same shape.
    """

    base: StoredTensor
    tuned: StoredTensor

    def tuned_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the tuned weight."""
        return read_rows(self.tuned, start, stop)

    def scan(self) -> Scan:
        """Norms, and the noise of both weights' rounding; raises ValueError for NaN or infinity."""
        return self._scan_rows((self.base.dtype, self.tuned.dtype))


@dataclass(frozen=True)
class LowRankChange(_Dense):
    """A stored weight and the factors of its update, LoRA's or DoRA's.

    Attributes:
      base: The base.
      left: ``[m, r]`` float32; the update is ``left @ right`` in the orientation of the stored weight.
      right: ``[r, n]``.
      magnitude: DoRA's norms, ``[m]`` of rows, or ``[n]`` of columns; None for LoRA.
      of_columns: Whether these are of the columns.
    """

    base: StoredTensor
    left: np.ndarray
    right: np.ndarray
    magnitude: np.ndarray | None = None
    of_columns: bool = False

    def _sum(self, start: int, stop: int) -> np.ndarray:
        product = np.asarray(jnp.matmul(self.left[start:stop], self.right, precision="highest"))
        return read_rows(self.base, start, stop) + product

    def tuned_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the tuned weight."""
        rows = self._sum(start, stop)
        if self.magnitude is None:
            return rows
        if self.of_columns:
            return rows * (self.magnitude / self._column_norms)
        return rows * (self.magnitude[start:stop] / np.linalg.norm(rows, axis=1))[:, None]

    @functools.cached_property
    def _column_norms(self) -> np.ndarray:
        squares = sum(np.square(self._sum(a, b)).sum(axis=0) for a, b in _slices(self.shape, _SCANNED))
        return np.sqrt(squares)

    def delta_matrix(self) -> Rows | Decomposition:
        """The update: of LoRA decomposed by its factors, of DoRA, which scales whole rows, as a matrix."""
        return decompose_product(self.left, self.right) if self.magnitude is None else super().delta_matrix()

    def scan(self) -> Scan:
        """Norms; factors are taken as exact, DoRA's update is rounded to float32."""
        if self.magnitude is not None:
            return self._scan_rows((np.dtype(np.float32),) * 2)
        base = 0.0
        for start, stop in _slices(self.shape, _SCANNED):
            base += float(np.sum(np.square(read_rows(self.base, start, stop)), dtype=np.float64))
        left, right = (np.asarray(x, np.float64) for x in (self.left, self.right))
        return Scan(math.sqrt(base), math.sqrt(max(float(np.sum((left.T @ left) * (right @ right.T))), 0.0)), 0.0)


Change = StoredChange | LowRankChange
