"""One unit of a network for each unit of another, by correlation or any other score (arXiv 1511.07543, section 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax import assignment


class Matching(NamedTuple):
    """A partner for each unit.

    Attributes:
      rows: Units of the first network that have a partner, ascending, ``[m]`` int32.
      columns: Their partners, ``[m]`` int32.
      values: Scores of the pairs, ``[m]``.
    """

    rows: jax.Array
    columns: jax.Array
    values: jax.Array


def semi_match(c: jax.Array, *, within: bool = False) -> Matching:
    """The best partner of each unit, which several units may share.

    Args:
      c: Scores ``[p, q]``, such as signed correlations.
      within: Whether both are the same units, so that the diagonal is no choice.

    Returns:
      The matching, of all ``p`` units; works under ``jit``.

    Raises:
      ValueError: ``c`` is no matrix, or not square where ``within``.
    """
    c = _scores(c, within)
    columns = jnp.argmax(c, axis=1).astype(jnp.int32)
    rows = jnp.arange(c.shape[0], dtype=jnp.int32)
    return Matching(rows, columns, c[rows, columns])


def max_match(c: jax.Array, *, within: bool = False) -> Matching:
    """The one-to-one matching with the largest sum of scores.

    Exact.  An array is solved on the host by SciPy; under a trace, the Hungarian algorithm of Optax is compiled, which
    is far slower above some hundred units.  Where units are duplicated the sum is unique and the matching is not.

    Args:
      c: Scores ``[p, q]``.
      within: Whether both are the same units: none is matched with itself.

    Returns:
      The matching, of ``min(p, q)`` pairs.

    Raises:
      ValueError: ``c`` is no matrix or not square where ``within``; or holds NaN, unless traced.
    """
    c = _scores(c, within)
    # A finite score that no matching with another choice takes.
    if within:
        lowest = jnp.min(jnp.where(jnp.isfinite(c), c, jnp.inf))
        c = jnp.where(jnp.isfinite(c), c, lowest - 2 * c.shape[0] * (jnp.max(c) - lowest + 1))
    if isinstance(c, jax.core.Tracer):
        rows, columns = assignment.hungarian_algorithm(-c)
        order = jnp.argsort(rows)
        rows, columns = rows[order].astype(jnp.int32), columns[order].astype(jnp.int32)
    else:
        from scipy.optimize import linear_sum_assignment

        scores = np.asarray(c, np.float64)
        if not np.isfinite(scores).all():
            raise ValueError("c: expected finite scores, got NaN or infinity")
        rows, columns = (jnp.asarray(x, jnp.int32) for x in linear_sum_assignment(scores, maximize=True))
    return Matching(rows, columns, c[rows, columns])


def overlap(semi: Matching, matched: Matching) -> jax.Array:
    """The share of matched units whose partner is also their best one: of equal score, where units are duplicated."""
    return jnp.mean((semi.values[matched.rows] == matched.values).astype(jnp.float32))


def follow_loops(pi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of units in which those matched in turn are neighbours: the cycles of a permutation.

    A matrix of correlations ordered so, ``c[order][:, order]``, has matched pairs beside its diagonal.

    Args:
      pi: A permutation ``[p]``, the partner of each unit.

    Returns:
      The order ``[p]``, from the smallest unit that is not in it yet until its cycle returns; and the cycles' lengths.

    Raises:
      ValueError: ``pi`` is no permutation.
    """
    pi = np.asarray(pi)
    if pi.ndim != 1 or not np.array_equal(np.sort(pi), np.arange(len(pi))):
        raise ValueError(f"pi: expected a permutation of 0 to {pi.size - 1}, got {pi}")
    order, lengths, seen = [], [], np.zeros(len(pi), bool)
    for first in range(len(pi)):
        unit, before = first, len(order)
        while not seen[unit]:
            seen[unit] = True
            order.append(unit)
            unit = int(pi[unit])
        if len(order) > before:
            lengths.append(len(order) - before)
    return np.array(order), np.array(lengths)


def _scores(c: jax.Array, within: bool) -> jax.Array:
    if c.ndim != 2 or 0 in c.shape or (within and c.shape[0] != c.shape[1]):
        raise ValueError(f"c: expected scores [p, q]{', p = q,' if within else ''} got shape {c.shape}")
    c = jnp.asarray(c)
    if not within:
        return c
    if c.shape[0] < 2:
        raise ValueError("c: expected two units or more, of which none is matched with itself, got one")
    return jnp.where(jnp.eye(c.shape[0], dtype=bool), -jnp.inf, c)
