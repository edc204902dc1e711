"""Weighted sums of low-rank updates of one weight, as the factors of one low-rank update."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.adapters.config import LowRankUpdate
from subspace_jax.adapters.factors import adapted, column_norm
from subspace_jax.adapters.structured import as_dense
from subspace_jax.merge.subspace_fusion.ties import ties_merge


class MergedUpdate(NamedTuple):
    """A low-rank update of a weight: ``W + a b``, or ``(W + a b) diag(magnitude / norm)`` with a magnitude.

    Attributes:
      a: ``[..., rows, rank]``, orthogonal columns.
      b: ``[..., rank, out]``; without a magnitude its rows are orthogonal, with the norms of the columns of ``a``.
      magnitude: ``[..., out]``, or None; the norms are those of the columns of ``W + a b``.
      size: ``[...]``, Frobenius norm of the sum of the updates.
      spectrum: ``[..., k]``, the singular values of the part that is approximated, descending, with or without those
        that were dropped; the others are not known where the part was never decomposed.
      lost: ``[...]``, Frobenius norm of the difference between the sum and this update.
    """

    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None
    size: jax.Array
    spectrum: jax.Array
    lost: jax.Array


def merge_core(
    updates: Sequence[LowRankUpdate], weights: jax.Array, limits: jax.Array, rank: int, base: Any = None
) -> MergedUpdate:
    """Adds up low-rank updates in their core space: two orthonormal bases and one small SVD, nothing dense.

    With ``A = [a_1, a_2, ...]`` and ``B`` the weighted ``b_i`` one above the other the sum is ``A B``, whose SVD comes
    from an SVD as wide as the ranks together; the best update of lower rank keeps its leading triplets.

    An update with a gain, DoRA's, is ``W diag(g_i - 1) + a_i b_i diag(g_i)``.  The sum of such is
    ``W diag(d) + A B``, and the weight becomes ``(W + A B diag(1 / g)) diag(g)`` with ``g = 1 + d``: one update with a
    gain, exactly.  Only ``A B`` is approximated where the rank is lower.

    Traceable; arrays may be sharded along rows and outputs.  Stacked weights are done one after the other, so that
    temporaries are those of one.

    Args:
      updates: Of one weight, float32 or float64.
      weights: ``[number of updates]``.
      limits: Integers ``[...]``, the rank of each stacked weight, at most ``rank``.
      rank: Rank of the result, static, at most ``min(rows, out)`` and the sum of the ranks.
      base: The weight ``[..., rows, out]``, needed where an update has a gain; the result has a magnitude if it is
        given.

    Returns:
      The merged update.
    """
    a, b, gains = zip(*updates, strict=True)

    def merge(operands):
        return _merge_matrix(*operands, weights, rank)

    return _of_each(merge, (a, b, gains, limits, base), a[0].ndim)


def merge_dense(
    key: jax.Array,
    updates: Sequence[LowRankUpdate],
    weights: jax.Array,
    limit: jax.Array,
    rank: int,
    *,
    base: Any = None,
    keep: float | None = None,
) -> MergedUpdate:
    """Adds up the updates of one matrix as a matrix, by TIES where ``keep`` is given, and approximates it.

    Holds a matrix for each update; call it for one matrix at a time, and not under ``jax.jit``.

    Args:
      key: Random key of the sketch, see :func:`subspace_jax.linalg.randomized_svd`.
      updates: Of one weight ``[rows, out]``, float32 or float64.
      weights: ``[number of updates]``.
      limit: Integer ``[]``, see :func:`merge_core`.
      rank: Rank of the arrays of the result, static, at most ``min(rows, out)``.
      base: The weight ``[rows, out]``; only read where an update has a gain.
      keep: Share of the entries that TIES keeps of each update; a plain sum by default.

    Returns:
      The merged update, without a magnitude; the spectrum ends at the rank.
    """
    scaled = _scaled_dense(updates, weights, base)
    # A program of its own: a fused entry, computed twice and rounded otherwise, may lie below the threshold that it is.
    return _approximated(key, sum(scaled) if keep is None else _ties(scaled, keep), limit, rank)


_ties = jax.jit(ties_merge, static_argnums=1)


@jax.jit
def _scaled_dense(updates, weights, base):
    return [weight * _dense(update, base) for weight, update in zip(weights, updates, strict=True)]


@functools.partial(jax.jit, static_argnums=3)
def _approximated(key, total, limit, rank):
    u, s, vt = linalg.randomized_svd(key, total, rank)
    root = jnp.sqrt(jnp.where(jnp.arange(s.size, dtype=limit.dtype) < limit, s, 0))
    a, b = u * root[None, :], root[:, None] * vt
    return MergedUpdate(a, b, None, jnp.linalg.norm(total), s, jnp.linalg.norm(total - linalg.times(a, b)))


def _merge_matrix(a, b, gains, limit, base, weights, rank):
    scaled = [w * (x if g is None else x * g[None, :]) for w, x, g in zip(weights, b, gains, strict=True)]
    joined = jnp.concatenate(a, axis=-1), jnp.concatenate(scaled, axis=-2)
    u, s, vt = linalg.product_svd(*joined)
    kept = jnp.arange(s.size, dtype=limit.dtype) < limit
    root = jnp.sqrt(jnp.where(kept, s, 0))[:rank]
    left, right = u[:, :rank] * root[None, :], root[:, None] * vt[:rank]
    lost, size = jnp.linalg.norm(jnp.where(kept, 0, s)), jnp.linalg.norm(s)
    if base is None:
        return MergedUpdate(left, right, None, size, s, lost)
    zero = jnp.zeros(right.shape[-1], s.dtype)
    shift = sum((w * (g - 1) for w, g in zip(weights, gains, strict=True) if g is not None), zero)
    gain = 1 + shift
    right = right / gain[None, :]
    w = as_dense(base).astype(s.dtype)
    along = jnp.sum(linalg.gram(joined[0], w) * joined[1], axis=0)
    squares = jnp.square(shift) * jnp.sum(jnp.square(w), axis=0) + 2 * shift * along
    size = jnp.sqrt(jnp.maximum(jnp.sum(squares) + jnp.square(size), 0))
    return MergedUpdate(left, right, gain * column_norm(base, left, right, 1.0), size, s, lost)


def _dense(update: LowRankUpdate, base: Any) -> jax.Array:
    if update.gain is None:
        return linalg.times(update.a, update.b)
    w = as_dense(base).astype(update.a.dtype)
    return adapted(base, update.a, update.b, 1.0) * update.gain[None, :] - w


def _of_each(function, operands, ndim):
    """Maps a function of matrices over their leading axes, one after the other."""
    if ndim == 2:
        return function(operands)
    return jax.lax.map(lambda own: _of_each(function, own, ndim - 1), operands)
