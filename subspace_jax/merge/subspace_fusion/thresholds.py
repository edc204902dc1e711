"""The thresholds and signs of TIES over vectors that come in pieces: exact, from counts in a fixed amount of memory."""

import numpy as np

_HALF = 16  # of the 32 bits of a magnitude


class Thresholds:
    """Finds the smallest magnitude that each of some vectors keeps, and the sign of most of their entries.

    The bits of magnitudes in float32 are in the order of the magnitudes: one pass counts their upper halves, a second
    the lower halves of those that share the upper half of the threshold, a third the elected signs.

    Args:
      count: Number of vectors.

    Attributes:
      values: The thresholds, after :meth:`narrow` has been called twice.
      majority: The sign of the sum of elected signs, after the third pass.
    """

    def __init__(self, count: int):
        self._high = np.zeros((count, 2**_HALF), np.int64)
        self._low = np.zeros((count, 2**_HALF), np.int64)
        self._prefix: list[int] = []
        self._signs = 0
        self.values: tuple[float, ...] = ()

    @property
    def majority(self) -> int:
        """See the class."""
        return int(np.sign(self._signs))

    def count_high(self, vectors: np.ndarray) -> None:
        """Takes a piece ``[T, n]`` of all vectors in the first pass."""
        for counts, bits in zip(self._high, _bits(vectors), strict=True):
            counts += np.bincount(bits >> _HALF, minlength=2**_HALF)

    def count_low(self, vectors: np.ndarray) -> None:
        """Takes a piece in the second pass."""
        for prefix, counts, bits in zip(self._prefix, self._low, _bits(vectors), strict=True):
            counts += np.bincount(bits[bits >> _HALF == prefix] & (2**_HALF - 1), minlength=2**_HALF)

    def count_signs(self, vectors: np.ndarray) -> None:
        """Takes a piece in the third pass."""
        lows = np.asarray(self.values, np.float32)[:, None]
        self._signs += int(np.sign(np.where(np.abs(vectors) >= lows, vectors, 0).sum(axis=0)).sum(dtype=np.int64))

    def narrow(self, rank: int) -> None:
        """Ends a pass; ``rank`` is the number of the threshold among the magnitudes, from 1."""
        if not self._prefix:
            self._prefix = [int(np.searchsorted(np.cumsum(counts), rank)) for counts in self._high]
        elif not self.values:
            found = []
            for prefix, high, low in zip(self._prefix, self._high, self._low, strict=True):
                left = rank - int(high[:prefix].sum())
                found.append(prefix << _HALF | int(np.searchsorted(np.cumsum(low), left)))
            self.values = tuple(np.asarray(found, np.uint32).view(np.float32).tolist())


def _bits(vectors: np.ndarray) -> np.ndarray:
    return np.abs(np.ascontiguousarray(vectors)).view(np.uint32)
