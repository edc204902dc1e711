"""Intrinsic dimension (arXiv 1804.08838)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

SEARCHES = ("ascending", "bisect")


def d_int(
    dims: ArrayLike, scores: ArrayLike, baseline: float, fraction: float = 0.9
) -> tuple[int | None, float | None]:
    """Finds the smallest dimension at which the mean score is above a fraction of the baseline.

    Args:
      dims: ``[runs]`` integers, the dimension of each run; in any order, repeats are runs with other seeds.
      scores: ``[runs]``, larger is better.
      baseline: Score of training in all parameters, or a fixed one.
      fraction: The fraction: 0.9 for d_int90, 1 for d_int100.

    Returns:
      The dimension, and the mean score there; ``(None, None)`` if no dimension is sufficient.

    Raises:
      ValueError: The lengths differ, there is no run, a score or the baseline is not finite, or a dimension is below 1.

    Examples:
      >>> d_int([10, 20, 20, 30], [0.5, 0.8, 1.0, 0.95], baseline=0.99)
      (20, 0.9)
    """
    dims, scores = _checked(dims, scores, baseline)
    unique, means = _means(dims, scores)
    passed = np.flatnonzero(means > fraction * baseline)
    return (int(unique[passed[0]]), float(means[passed[0]])) if passed.size else (None, None)


def d_int_bootstrap(
    key: jax.Array,
    dims: ArrayLike,
    scores: ArrayLike,
    baseline: float,
    fraction: float = 0.9,
    num_samples: int = 100,
) -> tuple[float | None, float | None]:
    """Error bars of :func:`d_int`: in each sample every dimension has the score of one of its runs, drawn at random.

    Args:
      key: Random key.
      dims: See :func:`d_int`.
      scores: See :func:`d_int`.
      baseline: See :func:`d_int`.
      fraction: See :func:`d_int`.
      num_samples: Samples.

    Returns:
      Mean and standard deviation of the dimension over the samples that reach the fraction; None if none does.

    Raises:
      ValueError: As :func:`d_int`, or ``num_samples`` is below 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    dims, scores = _checked(dims, scores, baseline)
    unique, counts = np.unique(dims, return_counts=True)
    by_dim = scores[np.argsort(dims, kind="stable")]
    first = np.cumsum(counts) - counts
    uniform = np.asarray(jax.random.uniform(key, (num_samples, len(unique)), jnp.float32))
    drawn = by_dim[first + np.minimum((uniform * counts).astype(np.int64), counts - 1)]
    passed = drawn > fraction * baseline
    found = unique[np.argmax(passed, axis=1)][passed.any(axis=1)]
    return (float(found.mean()), float(found.std())) if found.size else (None, None)


def search_d_int(
    score: Callable[[int], float],
    dims: Sequence[int],
    baseline: float,
    fraction: float = 0.9,
    method: str = "ascending",
) -> tuple[int | None, dict[int, float]]:
    """Finds the intrinsic dimension with few runs.

    Args:
      score: Trains in a subspace of a dimension, and returns the score, larger is better.
      dims: The dimensions among which to look, in any order.
      baseline: See :func:`d_int`.
      fraction: See :func:`d_int`.
      method: "ascending" stops at the first sufficient dimension; "bisect" takes ``log2`` of their number of runs, and
        finds the same if scores rise with the dimension.

    Returns:
      The dimension, or None if none is sufficient; and the scores of the evaluated dimensions.

    Raises:
      ValueError: There are no dimensions, the method is unknown, or a score is not finite.
    """
    if method not in SEARCHES:
        raise ValueError(f"method: expected one of {SEARCHES}, got {method!r}")
    scores: dict[int, float] = {}

    def enough(dim: int) -> bool:
        scores[dim] = float(score(dim))
        return d_int([dim], [scores[dim]], baseline, fraction)[0] is not None

    dims = [int(dim) for dim in np.unique(_checked(dims, np.zeros(len(dims)), baseline)[0])]
    if method == "ascending":
        return next((dim for dim in dims if enough(dim)), None), scores
    low, high = 0, len(dims)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(dims[middle]) else (middle + 1, high)
    return dims[low] if low < len(dims) else None, scores


def mdl_bits(d: int, bits: int = 32) -> int:
    """Returns an upper bound of a solution's description length: its coordinates, without the seed.

    Args:
      d: Dimension of the subspace.
      bits: Bits per coordinate.

    Returns:
      Bits.

    Raises:
      ValueError: An argument is below 1.
    """
    if d < 1 or bits < 1:
        raise ValueError(f"d, bits: expected at least 1, got {d} and {bits}")
    return d * bits


def _checked(dims: ArrayLike, scores: ArrayLike, baseline: float) -> tuple[np.ndarray, np.ndarray]:
    dims, scores = np.asarray(dims), np.asarray(scores, np.float64)
    if dims.ndim != 1 or dims.shape != scores.shape or not dims.size:
        raise ValueError(f"dims, scores: expected one score for each of some runs, got {dims.shape} and {scores.shape}")
    if np.any(dims < 1) or np.any(dims != np.floor(dims)):
        raise ValueError(f"dims: expected integers of at least 1, got {dims[(dims < 1) | (dims != np.floor(dims))]}")
    if not np.all(np.isfinite(scores)):
        raise ValueError(f"scores: expected finite numbers, got {scores[~np.isfinite(scores)][0]}")
    if not math.isfinite(baseline):
        raise ValueError(f"baseline: expected a finite number, got {baseline}")
    return dims, scores


def _means(dims: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, inverse, counts = np.unique(dims, return_inverse=True, return_counts=True)
    return unique, np.bincount(inverse, weights=scores) / counts
