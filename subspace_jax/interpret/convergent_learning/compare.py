"""Similarities of two representations beside those of shuffled examples, which say what the numbers are worth."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.convergent_learning import scores
from subspace_jax.interpret.convergent_learning.matching import max_match
from subspace_jax.interpret.convergent_learning.statistics import (
    UnitMoments,
    standardized,
    unit_stats_finalize,
    unit_stats_init,
    unit_stats_update,
)
from subspace_jax.linalg import gram

MEASURES, FAST_MEASURES = scores.MEASURES, scores.FAST
# Shuffles between two updates of a progress bar.
_AT_A_TIME = 10
_BLOCK_BYTES = 2**25
_FEWEST = 5


class Null(NamedTuple):
    """The representations without anything in common that others are held against.

    Attributes:
      permutations: Number of shuffles of the examples; the least p-value is ``1 / (permutations + 1)``.
      examples: Most examples of a shuffle; None for all.
      seed: Of the shuffles, and of the random subset of examples.
    """

    permutations: int = 199
    examples: int | None = 2000
    seed: int = 0


_NULL = Null()


class Score(NamedTuple):
    """A similarity of two representations.

    Attributes:
      value: The measure; NaN where it is trivial.
      null_mean: Its mean over shuffles of the examples of one side.
      null_std: Its standard deviation over them.
      calibrated: ``(value - null_mean) / (1 - null_mean)``, of the examples of the null: 0 on average for independent
        representations, 1 for equal ones.
      p_value: Share of the shuffles, and the true order among them, that reach the value of the true order.
      examples: Number of examples that ``value`` is of.
      null_examples: Number of examples of the other fields.
      note: Why it is NaN, or what else is to be known; empty otherwise.
    """

    value: float
    null_mean: float
    null_std: float
    calibrated: float
    p_value: float
    examples: int
    null_examples: int
    note: str = ""


def compare(
    x: np.ndarray,
    y: np.ndarray,
    *,
    measures: Sequence[str] = MEASURES,
    null: Null = _NULL,
    k: int = 10,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Compares two representations of the same examples by many measures, each with a permutation null.

    Values of most measures grow with the width and fall with the number of examples whatever the representations have
    in common; the null has the same width, examples and spectra, and nothing in common.  The p-value is exact for any
    distribution of independent examples (Phipson and Smyth, 2010).

    More examples than ``null.examples`` are streamed in blocks for what follows from covariances; kernels and
    neighbours, and the null of all measures, are of a random subset.

    Args:
      x: ``[n, p]`` real numbers, such as a memory-mapped file.
      y: ``[n, q]``, of the same examples.
      measures: Names from :data:`MEASURES`.
      null: The shuffles.
      k: Neighbours of the neighbourhood measures.
      progress: Called with the number of shuffles done since the last call.

    Returns:
      A score for each measure, in the order of ``measures``.  Those that are the same for any representations, such as
      CCA where there are no more examples than columns, are NaN with a note.

    Raises:
      ValueError: The numbers of examples differ, there are fewer than five, a value is not finite, a side is constant,
        or an argument is out of range.
      TypeError: A side does not hold real numbers.
    """
    return compare_prepared(x, y, prepared, measures=measures, null=null, k=k, progress=progress)


def prepared(name: str, x: np.ndarray, rows: np.ndarray, measures: tuple[str, ...], k: int) -> scores.Side:
    """Returns what a comparison needs of the examples ``rows`` of one side; raises as :func:`compare`."""
    some = jnp.asarray(np.asarray(x[rows]), _dtype(x))
    _check_values(name, np.asarray(some))
    if bool(jnp.all(standardized(some)[1] == 0)):
        raise ValueError(f"{name}: expected units that vary, got {x.shape[1]} constant ones")
    return _prepare(some, measures, k)


def compare_prepared(
    x: np.ndarray,
    y: np.ndarray,
    prepare: Callable[..., scores.Side],
    *,
    measures: Sequence[str] = MEASURES,
    null: Null = _NULL,
    k: int = 10,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """As :func:`compare`, with sides by ``prepare``: :func:`prepared`, or one that keeps them."""
    x, y = (check_features(name, a) for name, a in (("x", x), ("y", y)))
    n = len(x)
    if len(y) != n:
        raise ValueError(f"x, y: expected the same examples, got {n} and {len(y)}")
    measures = check_measures(measures)
    if null.permutations < 1:
        raise ValueError(f"null.permutations: expected at least 1, got {null.permutations}")
    rng = np.random.default_rng(null.seed)
    count = n if null.examples is None else min(n, null.examples)
    if count < _FEWEST:
        raise ValueError(f"null.examples: expected at least {_FEWEST}, got {null.examples}")
    if set(measures) & set(scores.NEIGHBORS) and not 2 <= k < count:
        raise ValueError(f"k: expected 2 to {count - 1} neighbours of {count} examples, got {k}")
    rows = np.arange(n) if count == n else np.sort(rng.choice(n, count, replace=False))
    sides = [prepare(name, a, rows, measures, k) for name, a in (("x", x), ("y", y))]
    whole = {} if count == n else _streamed(x, y, measures)
    orders = np.stack([np.arange(count), *(rng.permutation(count) for _ in range(null.permutations))]).astype(np.int32)
    trivial = _trivial(sides, count, k)
    values = _scores_of_orders(*sides, orders, tuple(name for name in measures if name not in trivial), progress)
    return {name: _summary(values.get(name), whole.get(name), (n, count), trivial.get(name, "")) for name in measures}


def check_measures(names: Sequence[str]) -> tuple[str, ...]:
    """Returns names of measures; raises ValueError for one that is unknown."""
    if unknown := [name for name in names if name not in MEASURES]:
        raise ValueError(f"measures: expected some of {', '.join(MEASURES)}, got {unknown[0]!r}")
    if not names:
        raise ValueError("measures: expected at least one, got none")
    return tuple(names)


def check_features(name: str, x: np.ndarray) -> np.ndarray:
    """Returns features ``[n, p]``, not copied; raises ValueError or TypeError for something else."""
    x = x if isinstance(x, np.ndarray) else np.asarray(x)
    if x.dtype.kind not in "fiu" and x.dtype != jnp.bfloat16:
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] < 1 or x.shape[0] < _FEWEST:
        raise ValueError(f"{name}: expected features [n, p] of {_FEWEST} examples or more, got shape {list(x.shape)}")
    return x


def _dtype(x: np.ndarray) -> np.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == np.float64 and jax.config.jax_enable_x64 else jnp.float32)


def _check_values(name: str, x: np.ndarray, start: int = 0) -> None:
    wrong = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(wrong):
        raise ValueError(f"{name}: expected finite features, got NaN or infinity in example {start + wrong[0]}")


def _blocks(x: np.ndarray, y: np.ndarray):
    """Blocks of both, of one shape each, with a mask of what is no padding."""
    n, width = len(x), x.shape[1] + y.shape[1]
    size = max(1, min(n, _BLOCK_BYTES // (4 * width)))
    for start in range(0, n, size):
        parts = []
        for name, a in (("x", x), ("y", y)):
            part = np.asarray(a[start : start + size], _dtype(a))
            _check_values(name, part, start)
            parts.append(np.pad(part, ((0, size - len(part)), (0, 0))))
        yield *parts, np.arange(size) < n - start


def stream_moments(x: np.ndarray, y: np.ndarray) -> UnitMoments:
    """Moments of the units of two matrices of any number of examples, read in blocks of 32 MiB.

    Args:
      x: ``[n, p]`` real numbers, such as a memory-mapped file.
      y: ``[n, q]``, of the same examples.

    Raises:
      ValueError: A value is not finite.
    """
    dtype = _dtype(x) if _dtype(x) == _dtype(y) else jnp.float32
    stats = unit_stats_init(x.shape[1], y.shape[1], dtype)
    for block in _blocks(x, y):
        # Waited for, so that blocks do not queue up in memory.
        stats = jax.block_until_ready(_update(stats, *block))
    return _finalize(stats)


_update = jax.jit(unit_stats_update, donate_argnums=0)
_finalize = jax.jit(unit_stats_finalize)
_prepare = jax.jit(scores.prepare, static_argnums=(1, 2))
_score_moments = jax.jit(scores.score_moments)


def _streamed(x: np.ndarray, y: np.ndarray, measures: tuple[str, ...]) -> dict[str, float]:
    """Values that follow from the moments of all examples."""
    wanted = set(measures) & set(scores.OF_MOMENTS)
    if not wanted:
        for _ in _blocks(x, y):  # raises for values that are not finite
            pass
        return {}
    moments = stream_moments(x, y)
    found = {name: float(value) for name, value in _score_moments(moments).items()}
    if "max_match" in wanted:
        found["max_match"] = float(max_match(moments.cor_xy).values.mean())
    if len(x) - 1 <= max(x.shape[1], y.shape[1]):
        found |= dict.fromkeys((*scores.CCA, *scores.REGRESSION, "svcca"), math.nan)
    return {name: value for name, value in found.items() if name in wanted}


@functools.partial(jax.jit, static_argnums=3)
def _of_orders(x: scores.Side, y: scores.Side, orders: jax.Array, measures: tuple[str, ...]) -> dict[str, jax.Array]:
    return jax.lax.map(lambda order: scores.score(x, scores.shuffled(y, order), measures), orders)


@jax.jit
def _correlations(x: scores.Side, y: scores.Side, order: jax.Array) -> jax.Array:
    return gram(x.linear.standard, y.linear.standard[order])


def _scores_of_orders(x, y, orders, measures, progress) -> dict[str, np.ndarray]:
    """Returns the value of each measure in each order of the examples of ``y``, the true order first."""
    found: dict[str, list] = {name: [] for name in measures}
    for start in range(0, len(orders), _AT_A_TIME):
        some = orders[start : start + _AT_A_TIME]
        # Of one shape, so that one program is compiled.
        padded = np.concatenate([some, np.repeat(orders[:1], _AT_A_TIME - len(some), axis=0)])
        for name, values in _of_orders(x, y, padded, measures).items():
            found[name] += np.asarray(values[: len(some)], np.float64).tolist()
        if "max_match" in measures:
            found["max_match"] += [float(max_match(_correlations(x, y, order)).values.mean()) for order in some]
        if progress is not None:
            progress(len(some))
    return {name: np.array(values) for name, values in found.items()}


def _trivial(sides: Sequence[scores.Side], count: int, k: int) -> dict[str, str]:
    """Returns why measures are the same for any representations, by name."""
    (x, y), notes = sides, {}
    why = "trivial: {} spans all {} examples; more examples, or fewer columns"

    def note(names, subspace, side):
        if subspace is not None and int(subspace.rank) >= count - 1:
            notes.update(dict.fromkeys(names, why.format(side, count)))

    for subspaces, names in (((x.span, y.span), scores.CCA), ((x.leading, y.leading), ("svcca",))):
        for subspace, side in zip(subspaces, "xy", strict=True):
            note(names, subspace, side)
    note(("r2_x_from_y",), y.span, "y")
    note(("r2_y_from_x",), x.span, "x")
    if k >= count - 1:
        notes |= dict.fromkeys(("mutual_knn", "cycle_knn"), f"trivial: all other examples are among {k} neighbours")
    return notes


def _summary(values: np.ndarray | None, whole: float | None, counts: tuple[int, int], trivial: str) -> Score:
    n, count = counts
    of = count if whole is None else n
    if trivial:
        return Score(math.nan if whole is None else whole, *[math.nan] * 4, of, count, trivial)
    value, null = values[0], values[1:]
    mean = null.mean()
    # What a shuffle gives in another order of operations may differ by rounding.
    reached = np.sum(null >= value - 1e-6 * abs(value))
    return Score(
        float(value if whole is None else whole),
        float(mean),
        float(null.std()),
        float((value - mean) / (1 - mean)) if mean < 1 else math.nan,
        float((1 + reached) / (1 + len(null))),
        of,
        count,
    )
