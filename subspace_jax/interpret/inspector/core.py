"""What an update did to a weight: its rank, how concentrated it is, and which directions are new."""

import math
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from subspace_jax.interpret.inspector.matrix import (
    Decomposition,
    Rows,
    as_rows,
    decompose,
    small_gram,
)

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of which the share of energy is reported
TOP, THRESHOLD = 10, 0.5  # intruder dimensions: vectors looked at, and the cosine
LEADING = 16  # directions of base and update that are compared
SKETCHED = RANKS[-1] + 8  # singular values of an update of a wide weight
_SKETCH = {"block": SKETCHED, "steps": 2}
_ACCURATE = {"block": LEADING, "steps": 8}
_COHERENT = 0.08  # share of the errors' norm that may be one singular value where they follow the update
_LANCZOS = 48  # steps of the bound on cosines
_SAFETY = 1.1  # on an estimate of a random matrix's largest singular value, which fluctuates


class UpdateSpectrum(NamedTuple):
    """The spectrum of an update.

    Attributes:
      singular_values: ``[r]`` float64, descending.
      complete: Whether these are all; else the ``r`` largest, from below.
      norm: Frobenius norm of the update.
      floor: Singular values up to this may come from rounding.
      rank: Number of singular values above the floor.
      rank_is_bound: Whether all that were computed are above it, so that the rank may be larger.
      stable_rank: Squared Frobenius norm over the squared largest singular value.
      effective_rank: Exponential of the entropy of the singular values over their sum (Roy and Vetterli, EUSIPCO 2007);
        those that were not computed are taken to fall like a power, from the last to zero, with the energy left.
      kept: Rank to the share of the squared norm that the best approximation of this rank has.
    """

    singular_values: np.ndarray
    complete: bool
    norm: float
    floor: float
    rank: int
    rank_is_bound: bool
    stable_rank: float
    effective_rank: float
    kept: dict[int, float]


class Intruders(NamedTuple):
    """High-ranking singular vectors of a tuned weight that resemble none of the base's.

    Attributes:
      count: How many certainly are intruder dimensions: no singular vector of the base has the cosine of the threshold.
      undecided: How many may be one, as the bounds on the largest cosine enclose the threshold.
      low: Lower bounds on the largest cosine, ``[top]``.
      high: Upper bounds; equal where the base is decomposed exactly, otherwise 1 where ``low`` is above the threshold.
      side: "left" or "right": of which side of the weight, the smaller one.
    """

    count: int
    undecided: int
    low: np.ndarray
    high: np.ndarray
    side: str


def decompose_update(delta: ArrayLike | Rows) -> Decomposition:
    """Decomposes an update ``[m, n]``, all singular values, or the 264 largest of a wide one; see :func:`decompose`."""
    delta = as_rows(delta)
    found = decompose(delta, min(LEADING, *delta.shape), **_SKETCH)
    if found.complete:
        return found
    # Those beyond the block, of the last step alone, are far too small.
    return found.leading(SKETCHED)._replace(s=found.s[:SKETCHED])


def decompose_weight(weight: ArrayLike | Rows) -> Decomposition:
    """Decomposes a weight ``[m, n]``, its leading directions accurately; see :func:`decompose`."""
    weight = as_rows(weight)
    return decompose(weight, min(LEADING, *weight.shape), **_ACCURATE)


def update_spectrum(
    update: ArrayLike | Rows | Decomposition,
    shape: tuple[int, int] | None = None,
    *,
    norm: float | None = None,
    noise: float = 0.0,
) -> UpdateSpectrum:
    """Rank, effective ranks and shares of energy of an update.

    Args:
      update: The update ``[m, n]``, or its decomposition.
      shape: ``(m, n)`` of a decomposition.
      norm: Frobenius norm, where it is known; else that of the array, or of the singular values.
      noise: Largest singular value that rounding of the stored weights may have, see :func:`rounding_floor`.  Rounding
        of the computation, ``4 sqrt(max(m, n)) eps`` times the largest singular value in float32, is added as a second
        floor.

    Raises:
      ValueError: The update is no matrix, or zero.
    """
    if not isinstance(update, Decomposition):
        rows = as_rows(update)
        shape, update = rows.shape, decompose_update(rows)
        if norm is None:
            norm = math.sqrt(sum(float(np.sum(np.square(np.asarray(x, np.float64)))) for _, x in rows.blocks()))
    s, (m, n) = update.s, shape
    known = float(np.sum(s**2))
    total = known if norm is None else max(norm**2, known)
    if not s[0] > 0:
        raise ValueError("update: is zero, so it has no spectrum")
    floor = max(noise, 4 * math.sqrt(max(m, n)) * float(np.finfo(np.float32).eps) * s[0])
    rank = int(np.sum(s > floor))
    kept = np.cumsum(s**2) / total
    return UpdateSpectrum(
        singular_values=s,
        complete=update.complete,
        norm=math.sqrt(total),
        floor=floor,
        rank=rank,
        rank_is_bound=not update.complete and rank == len(s),
        stable_rank=total / float(s[0]) ** 2,
        effective_rank=_effective_rank(s, 0.0 if update.complete else total - known, min(m, n) - len(s)),
        kept={r: float(min(kept[min(r, len(s)) - 1], 1.0)) for r in RANKS if r < 2 * len(s)},
    )


def _effective_rank(s: np.ndarray, left: float, count: int) -> float:
    if left > 0 and count > 0:
        # The power whose mean square is that of what is left; 0 where that is as much as the last value's.
        power = max(0.0, (count * s[-1] ** 2 / left - 1) / 2)
        tail = (1 - (np.arange(count) + 0.5) / count) ** power
        s = np.concatenate([s, tail * math.sqrt(left / float(np.sum(tail**2)))])
    p = s[s > 0] / s.sum()
    return math.exp(-float(np.sum(p * np.log(p))))


def rounding_floor(row_variances: np.ndarray, column_variances: np.ndarray, coarse: float = 0.0) -> float:
    """Bound on the singular values that rounding adds to an update.

    ``1.1 (max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij)) + 0.08 sqrt(coarse)``.  The first part is for independent
    centred errors of variances ``v``: the leading terms of Bandeira and van Handel (arXiv 1408.6185), and a tenth for
    what the largest singular value fluctuates.  Where an entry changed by a spacing or less its error is a function of
    the change, and such errors add up to few directions: the second part.  Its factor is measured, not derived: rank-1
    edits of Gaussian weights in bfloat16 need 0.05.

    Args:
      row_variances: Sums of the entries' variances over each row, ``[m]``.
      column_variances: The same over each column, ``[n]``.
      coarse: Sum of the variances of entries that changed by about one spacing or less.
    """
    rows, columns = (math.sqrt(float(np.max(x))) for x in (row_variances, column_variances))
    return _SAFETY * (rows + columns) + _COHERENT * math.sqrt(coarse)


def intruder_dimensions(
    base: ArrayLike | Rows,
    tuned: ArrayLike | Rows,
    *,
    top: int = TOP,
    threshold: float = THRESHOLD,
    decomposed: Decomposition | None = None,
) -> Intruders:
    """Counts intruder dimensions: leading singular vectors of the tuned weight unlike any of the base's.

    A vector counts if its absolute cosine with every singular vector of the base is below the threshold (Shuttleworth
    et al., arXiv 2410.21228).  The vectors of the smaller side are compared, where the paper takes those of the left
    side: those of the larger side of a base of full rank leave a null space, in which no singular vector is defined.

    A base whose smaller side is wider than 1024 is not decomposed whole.  For each vector ``y`` Lanczos steps with the
    Gram matrix give the first moments of its spectral measure, which has mass ``cos^2`` at the square of each singular
    value; no measure of these moments has more mass at a point than its Christoffel function there, whose largest value
    is the upper bound.

    Args:
      base: ``[m, n]``.
      tuned: ``[m, n]``.
      top: Number of leading singular vectors of the tuned weight.
      threshold: The cosine.
      decomposed: The base's :func:`decompose_weight`, where it is at hand.

    Raises:
      ValueError: Shapes differ, or ``top`` or ``threshold`` is out of range.
    """
    base, tuned = as_rows(base), as_rows(tuned)
    if base.shape != tuned.shape:
        raise ValueError(f"base, tuned: expected one shape, got {base.shape} and {tuned.shape}")
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a cosine in (0, 1], got {threshold}")
    decomposed = decompose_weight(base) if decomposed is None else decomposed
    top = min(top, *base.shape)
    known = getattr(decomposed, base.side)
    vectors = getattr(decompose_weight(tuned), base.side)[:, :top]
    low = np.max(np.abs(known[:, : None if decomposed.complete else LEADING].T @ vectors), axis=0)
    low = np.minimum(np.asarray(low, np.float64), 1.0)
    high = low if decomposed.complete else np.ones_like(low)
    if not decomposed.complete and (open_ := low < threshold).any():
        high[open_] = np.clip(cosine_bound(base, vectors[:, open_]), low[open_], 1.0)
    below = high < threshold
    return Intruders(int(below.sum()), int(np.sum(~below & (low < threshold))), low, high, base.side)


def cosine_bound(matrix: ArrayLike | Rows, vectors: np.ndarray, steps: int = _LANCZOS) -> np.ndarray:
    """Upper bounds on the largest absolute cosine of vectors with any singular vector of a matrix.

    See :func:`intruder_dimensions`.

    Args:
      matrix: ``[m, n]``.
      vectors: Unit vectors of its smaller side, ``[min(m, n), k]``.
      steps: Lanczos steps.

    Returns:
      ``[k]``, up to float32 rounding of the matrix.
    """
    matrix = as_rows(matrix)
    alphas, betas, lengths = _lanczos(matrix, np.asarray(vectors, np.float64), min(steps, min(matrix.shape)))
    return np.asarray(
        [
            math.sqrt(_largest_mass(alpha[:length], beta[: length - 1]))
            for alpha, beta, length in zip(alphas.T, betas.T, lengths, strict=True)
        ]
    )


def _lanczos(matrix: Rows, vectors: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients ``[steps, k]`` of Lanczos' recurrences from each vector alone, and each one's number of steps."""
    basis = [vectors / np.linalg.norm(vectors, axis=0)]
    alphas, betas, lengths = [], [], np.full(vectors.shape[1], steps)
    scale = 0.0
    for step in range(steps):
        now = small_gram(matrix, basis[-1]).astype(np.float64)
        scale = max(scale, float(np.max(np.linalg.norm(now, axis=0))))
        alphas.append(np.sum(basis[-1] * now, axis=0))
        for _ in range(2):
            for other in basis:
                now -= other * np.sum(other * now, axis=0)
        beta = np.linalg.norm(now, axis=0)
        betas.append(beta)
        # The space is exhausted, to rounding of the products.
        ended = beta <= 1e-6 * scale
        lengths = np.where(ended, np.minimum(lengths, step + 1), lengths)
        if (lengths <= step + 1).all():
            break
        basis.append(now / np.where(beta > 0, beta, 1.0))
    return np.asarray(alphas), np.asarray(betas), np.minimum(lengths, len(alphas))


def _largest_mass(alpha: np.ndarray, beta: np.ndarray) -> float:
    """Largest value of the Christoffel function, the inverse of the sum of squared orthonormal polynomials."""
    jacobi = np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1)
    nodes, vectors = np.linalg.eigh(jacobi)
    if len(nodes) == 1:
        return 1.0
    # At the nodes it is Gauss' weights; the recurrence is unstable there, where a node has converged.
    found = float(np.max(np.square(vectors[0])))
    # Below and above all nodes the function falls off.  Its peaks are near nodes, and narrow where these converged.
    near = np.concatenate([np.linspace(0.0, 1.0, 17), 0.6 ** np.arange(2, 40), 1 - 0.6 ** np.arange(2, 40)])
    points = np.unique(nodes[:-1, None] + np.diff(nodes)[:, None] * near)
    for _ in range(4):
        mass = _christoffel(points, alpha, beta)
        best = int(np.argmax(mass))
        found = max(found, float(mass[best]))
        points = np.linspace(points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)], 33)
    return found


def _christoffel(points: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    before, now, total = np.zeros_like(points), np.ones_like(points), np.ones_like(points)
    for k in range(len(alpha) - 1):
        last = beta[k - 1] if k else 0.0
        before, now = now, ((points - alpha[k]) * now - last * before) / beta[k]
        total += now**2
    return 1 / total
