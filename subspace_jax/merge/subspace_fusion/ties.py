"""TIES: trimmed task vectors whose signs are elected entry by entry (arXiv 2306.01708)."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.merge.subspace_fusion.core import check_alike, wide

PyTree = Any
Combine = Literal["sum", "mean", "max"]
_BITS = 4  # of a threshold that are found in one pass


def ties_merge(taus: Sequence[PyTree], keep: float = 0.2, combine: Combine = "sum") -> PyTree:
    """Merges task vectors by trimming, electing signs, and combining what agrees with them.

    Each task vector keeps the entries whose magnitude is at least the ``n - int(keep n)``-th smallest of its ``n``,
    over all leaves together: ``int(keep n) + 1`` entries, more where magnitudes are equal.  The sign of an entry is
    that of the sum over what was kept; where it is 0, that of the sum of all elected signs.  Entries of that sign are
    combined.

    The threshold is exact, and found by counting: nothing is sorted, joined or gathered, so that leaves may be sharded.

    Args:
      taus: Of :func:`task_vectors`, with fewer than 2^31 entries.
      keep: Share of the entries to keep, in (0, 1].
      combine: "sum", as the authors' code does; "mean" of the entries that are not zero; or "max", the largest
        magnitude.

    Returns:
      One task vector, in float32 or wider; ``apply_task_vectors(base, [merged], lam)`` adds it to a base.

    Raises:
      ValueError: There is no task vector, the trees differ, there are too many entries, ``keep`` is outside (0, 1], or
        ``combine`` is unknown.
    """
    check_ties(keep, combine)
    if not taus:
        raise ValueError("taus: expected at least one task vector, got none")
    for i, tau in enumerate(taus[1:], 1):
        check_alike("task vector 0", taus[0], f"task vector {i}", tau)
    taus = [jax.tree.map(lambda x: x.astype(wide(x)), tau) for tau in taus]
    count = sum(x.size for x in jax.tree.leaves(taus[0]))
    if not 0 < count < 2**31:
        raise ValueError(f"taus: expected from 1 to 2^31 - 1 entries, got {count}")
    kept = [_trimmed(tau, threshold(tau, keep)) for tau in taus]
    signs = [jnp.sum(elected(leaves), dtype=jnp.int32) for leaves in zip(*map(jax.tree.leaves, kept), strict=True)]
    majority = jnp.sign(sum(signs))
    return jax.tree.map(lambda *leaves: combined(leaves, majority, combine), *kept)


def _trimmed(tau: PyTree, low: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: trim(x, low), tau)


def check_ties(keep: float, combine: str) -> None:
    """Raises ValueError for settings of TIES that can't serve."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
    if combine not in get_args(Combine):
        raise ValueError(f"combine: expected one of {list(get_args(Combine))}, got {combine!r}")


def rank_of_threshold(count: int, keep: float) -> int:
    """Which smallest magnitude of ``count`` is the threshold, from 1."""
    return max(count - int(keep * count), 1)


def threshold(tau: PyTree, keep: float) -> jax.Array:
    """The smallest magnitude that a task vector keeps, a scalar; other arguments: see :func:`ties_merge`."""
    leaves = jax.tree.leaves(tau)
    return _order_statistic(leaves, np.int32(rank_of_threshold(sum(x.size for x in leaves), keep)))


@jax.jit
def _order_statistic(leaves: Sequence[jax.Array], rank: jax.Array) -> jax.Array:
    """The ``rank``-th smallest magnitude of all leaves, from 1; one program for all task vectors and shares."""
    dtype = max((wide(x) for x in leaves), key=lambda dtype: dtype.itemsize)
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    # The bits of numbers that are not negative are in the order of the numbers.
    bits = [jax.lax.bitcast_convert_type(jnp.abs(x.astype(dtype)), unsigned) for x in leaves]
    width, steps = unsigned.itemsize * 8, np.arange(1, 2**_BITS, dtype=unsigned)

    def narrow(i, start):
        candidates = start + (steps << (width - _BITS * (i + 1)).astype(unsigned))
        below = jax.vmap(lambda c: sum(jnp.sum(x < c, dtype=jnp.int32) for x in bits))(candidates)
        chosen = jnp.sum(below < rank)
        return jnp.where(chosen == 0, start, candidates[jnp.maximum(chosen - 1, 0)])

    found = jax.lax.fori_loop(0, width // _BITS, narrow, jnp.zeros((), unsigned))
    return jax.lax.bitcast_convert_type(found, dtype)


def trim(x: jax.Array, low: jax.Array) -> jax.Array:
    """Entries of magnitude ``low`` or more, and zeros."""
    return jnp.where(jnp.abs(x) >= low, x, jnp.zeros((), x.dtype))


def elected(leaves: Sequence[jax.Array]) -> jax.Array:
    """The signs of the sums of trimmed leaves, int32; 0 where a sum is."""
    return jnp.sign(sum(leaves)).astype(jnp.int32)


def combined(leaves: Sequence[jax.Array], majority: jax.Array, combine: Combine) -> jax.Array:
    """Combines trimmed leaves of one shape; ``majority`` is the sign of entries whose sum is 0, int32."""
    sign = elected(leaves)
    sign = jnp.where(sign == 0, majority, sign)
    zero = jnp.zeros((), leaves[0].dtype)
    agreeing = [jnp.where(jnp.where(sign > 0, x > 0, x < 0), x, zero) for x in leaves]
    if combine == "max":
        largest = agreeing[0]
        for x in agreeing[1:]:
            largest = jnp.maximum(jnp.abs(largest), jnp.abs(x))
        return jnp.abs(largest) * sign.astype(zero.dtype)
    total = sum(agreeing)
    if combine == "sum":
        return total
    number = sum((x != 0).astype(zero.dtype) for x in agreeing)
    return total / jnp.maximum(number, jnp.ones((), zero.dtype))
