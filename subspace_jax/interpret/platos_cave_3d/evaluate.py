"""Matching and retrieval of unseen pairs, and the report of an alignment."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import assignment

from subspace_jax.interpret.platos_cave_3d.core import (
    AffineMap,
    CCASubspace,
    affine_of_moments,
    apply_affine,
    check_anchors,
    project_moments,
    project_x,
    project_y,
    subspace_of_moments,
)
from subspace_jax.interpret.platos_cave_3d.scores import (
    check_queries,
    cosine_scores,
    local_cka_of_moments,
    relative_representation,
)
from subspace_jax.linalg import PairMoments, pair_moments

METHODS = ("affine", "local-cka", "relative")
RETRIEVAL_KS = (1, 5, 10)


class AlignmentReport(NamedTuple):
    """What an alignment is worth on pairs that it was not fitted to.

    Attributes:
      method: "affine", "local-cka" or "relative".
      scores: How alike queries are in the subspace, ``[items, items]``: rows of ``y``, columns of ``x``.
      matching: Share of ``y`` that the assignment of the greatest total score gives their own ``x``, ``[]``.
      retrieval: Share of ``y`` with their own ``x`` among the 1, 5 and 10 of the highest score, ``[3]``.
      full_matching: The same by the same method on the features themselves, without a subspace.
      full_retrieval: ``[3]``.
      held_out_rho: Correlations of the projected queries along each direction, ``[k]``.
      subspace: The subspace; its ``rho`` are the correlations of the anchors.
      translation: The map of projected ``y`` to projected ``x``.
    """

    method: str
    scores: jax.Array
    matching: jax.Array
    retrieval: jax.Array
    full_matching: jax.Array
    full_retrieval: jax.Array
    held_out_rho: jax.Array
    subspace: CCASubspace
    translation: AffineMap

    @property
    def chance_matching(self) -> float:
        """The matching of random scores."""
        return 1 / self.scores.shape[0]

    @property
    def chance_retrieval(self) -> tuple[float, ...]:
        """The retrieval of random scores."""
        return tuple(min(1.0, k / self.scores.shape[0]) for k in RETRIEVAL_KS)


def match_accuracy(scores: jax.Array, key: jax.Array) -> jax.Array:
    """Share of items that the assignment of the greatest total score gives their own partner.

    Args:
      scores: ``[items, items]``, floating point; item ``i`` of the rows belongs to item ``i`` of the columns.
      key: Key of a permutation of the columns before the assignment, so that equal scores are not matched by index.

    Returns:
      A scalar between 0 and 1; ``1 / items`` is chance.

    Raises:
      ValueError: The scores are not square, or a concrete array is not finite.
    """
    scores = _checked(scores)
    count = scores.shape[0]
    order = jax.random.permutation(key, count)
    # What is added to a row or a column changes no assignment, and centred costs need far fewer steps.
    costs = jnp.mean(scores, axis=1, keepdims=True) - scores
    costs = costs - jnp.mean(costs, axis=0, keepdims=True)
    rows, columns = assignment.hungarian_algorithm(costs[:, order])
    return jnp.mean((rows == order[columns]).astype(scores.dtype))


def retrieval_at_k(scores: jax.Array, ks: Sequence[int]) -> jax.Array:
    """Share of items whose own partner is among the ``k`` of the highest score; of equal scores the first come first.

    Args:
      scores: ``[items, items]``, floating point; item ``i`` of the rows belongs to item ``i`` of the columns.
      ks: Numbers of retrieved items.

    Returns:
      A share for each of ``ks``; ``k / items`` is chance.

    Raises:
      ValueError: The scores are not square, a concrete array is not finite, or ``ks`` is empty or below 1.
    """
    scores = _checked(scores)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected numbers from 1, got {tuple(ks)}")
    index = jnp.arange(scores.shape[0])
    own = jnp.diagonal(scores)[:, None]
    before = (scores > own) | ((scores == own) & (index[None] < index[:, None]))
    rank = jnp.sum(before, axis=1)
    return jnp.mean((rank[:, None] < jnp.asarray(ks)[None]).astype(scores.dtype), axis=0)


def pearson(a: jax.Array, b: jax.Array) -> jax.Array:
    """Correlation of two arrays of one shape, such as distances of items in two spaces.

    Args:
      a: Of any shape, floating point.
      b: Of the same shape.

    Returns:
      A scalar in ``[-1, 1]``, float32 or wider; NaN where an array is constant.

    Raises:
      ValueError: The shapes differ, or there are fewer than two entries.
    """
    if a.shape != b.shape or a.size < 2:
        raise ValueError(f"a, b: expected two entries or more of one shape, got {a.shape} and {b.shape}")
    moments = pair_moments(a.reshape(-1, 1), b.reshape(-1, 1))
    return axis_correlations(moments)[0]


def axis_correlations(moments: PairMoments) -> jax.Array:
    """Returns the correlation of the i-th feature of either side, for each i, from moments of equal widths."""
    xx, xy, yy = (jnp.diagonal(c) for c in (moments.xx, moments.xy, moments.yy))
    return jnp.clip(xy / jnp.sqrt(xx) / jnp.sqrt(yy), -1, 1)


def align(
    xa: jax.Array,
    ya: jax.Array,
    xq: jax.Array,
    yq: jax.Array,
    k: int = 50,
    method: str = "affine",
    *,
    reg: float = 1e-8,
) -> AlignmentReport:
    """Aligns two feature spaces in the subspace of anchors, and measures it on other pairs (arXiv 2503.05283).

    Args:
      xa: Anchors in the first space, ``[anchors, p]``, floating point.
      ya: The same anchors in the second, ``[anchors, q]``.
      xq: Queries in the first space, ``[items, p]``.
      yq: The same items in the second, ``[items, q]``.
      k: Directions of the subspace.
      method: "affine" (least squares from ``y`` to ``x``, then cosines), "local-cka" (linear) or "relative" (cosines to
        the anchors).
      reg: See :func:`fit_cca_subspace`.

    Returns:
      The report; columns are matched in an order drawn with key 0, see :func:`match_accuracy`.

    Raises:
      ValueError: As :func:`fit_cca_subspace`; the numbers of queries differ, or the method is
        unknown.
    """
    xa, ya, xq, yq = (jnp.asarray(z) for z in (xa, ya, xq, yq))
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    check_anchors(xa, ya, k, reg == 0)
    check_queries(xa, ya, xq, yq)
    if xq.shape[0] != yq.shape[0]:
        raise ValueError(f"xq, yq: expected the same items, got {xq.shape[0]} and {yq.shape[0]}")
    key = jax.random.key(0)
    found = _aligned(xa, ya, xq, yq, k=k, method=method, reg=reg)
    scores, full, rest = found[0], found[1], found[2:]
    return AlignmentReport(
        method,
        scores,
        _match_accuracy(scores, key),
        retrieval_at_k(scores, RETRIEVAL_KS),
        _match_accuracy(full, key),
        retrieval_at_k(full, RETRIEVAL_KS),
        *rest,
    )


_match_accuracy = jax.jit(match_accuracy)


@functools.partial(jax.jit, static_argnames=("k", "method", "reg"))
def _aligned(xa, ya, xq, yq, *, k, method, reg):
    """Scores in the subspace and on all features, held-out correlations, the subspace and the map in it."""
    moments = pair_moments(xa, ya)
    sub = subspace_of_moments(moments, k, reg)
    px, py = project_x(sub, xq), project_y(sub, yq)
    anchors = (project_x(sub, xa), project_y(sub, ya)) if method == "relative" else None
    projected = project_moments(moments, sub)
    scores = scores_by(method, projected, px, py, anchors)
    full = scores_by(method, moments, xq, yq, (xa, ya))
    return scores, full, axis_correlations(pair_moments(px, py)), sub, affine_of_moments(projected)


def scores_by(
    method: str, moments: PairMoments, xq: jax.Array, yq: jax.Array, anchors: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Scores of queries by one of :data:`METHODS`, ``[items of y, items of x]``.

    Args:
      method: The method.
      moments: Moments of the anchors.
      xq: Queries in the first space.
      yq: Queries in the second.
      anchors: The anchors in both, for "relative".
    """
    if method == "affine":
        return cosine_scores(apply_affine(affine_of_moments(moments), yq), xq)
    if method == "local-cka":
        return local_cka_of_moments(moments, xq, yq).T
    return cosine_scores(*(relative_representation(z, a) for z, a in zip((yq, xq), reversed(anchors), strict=True)))


def _checked(scores):
    scores = jnp.asarray(scores)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not scores.size:
        raise ValueError(f"scores: expected [items, items], got {scores.shape}")
    if not isinstance(scores, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(scores))):
        raise ValueError("scores: expected finite numbers, got NaN or infinity")
    return scores
