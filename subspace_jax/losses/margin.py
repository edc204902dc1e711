"""Margin loss over pairs that are sampled within a class-balanced batch.

The loss is that of Wu et al., "Sampling Matters in Deep Embedding Learning" (arXiv 1706.07567), the pairs those of the
code of "Attention-based Dynamic Subspace Learners" (arXiv 2206.09068).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from subspace_jax.linalg import pairwise_sq_distances, working_dtype

_SQUARE_EPS = 1e-8  # below the root of a distance that is differentiated


class Pairs(NamedTuple):
    """Anchors with a positive and a negative example each, int32 ``[batch * (per_class - 1)]``; anchors ascend."""

    anchors: jax.Array
    positives: jax.Array
    negatives: jax.Array


class MarginTerms(NamedTuple):
    """What :func:`margin_loss` divides: the ``total`` of all terms, and the int32 number of ``active`` pairs."""

    total: jax.Array
    active: jax.Array


def pairwise_distances(m: jax.Array, others: jax.Array | None = None, *, min_sq: float = 1e-4) -> jax.Array:
    """Euclidean distances, bounded from below: ``sqrt(max(||m_i - o_j||^2, min_sq))``.

    Args:
      m: ``[rows, n]``, floating point.
      others: ``[others, n]``; ``m`` itself where None.
      min_sq: Lower bound of the squares; part of the definition of the sampler, see :func:`sample_pairs`.

    Returns:
      ``[rows, others]``, float32 or wider.
    """
    squares = pairwise_sq_distances(m, m if others is None else others)
    return jnp.sqrt(jnp.maximum(squares, min_sq))


def sample_pairs(
    m: jax.Array, labels: jax.Array, per_class: int, cutoff: float = 0.5, *, block_size: int | None = None
) -> Pairs:
    """Pairs each anchor with ``per_class - 1`` positives and as many of the nearest negatives that are not too near.

    Positives of an anchor are other examples of its label.  Its negatives are those with the smallest distance among
    examples of other labels at ``cutoff`` or more; where these do not suffice, the nearest of all others.  Positives
    and negatives are matched in the order of their indices (arXiv 2206.09068, the authors' code).  All shapes are
    static.  Memory is ``block x batch`` distances; blocks follow each other, so on a mesh that shards the batch leave
    them out.

    Args:
      m: Embeddings ``[batch, n]``, usually of unit length.
      labels: ``[batch]`` integers; each occurs ``per_class`` times, or a multiple of it, of which the first
        ``per_class - 1`` others are then an anchor's positives.
      per_class: Examples of a class, at least 2.
      cutoff: Smallest distance of a negative, above 0.
      block_size: Anchors at a time; all by default.

    Returns:
      The pairs; no gradient flows through their choice.

    Raises:
      ValueError: Shapes do not match, a number is out of range, the batch is not class-balanced, or an embedding is not
        finite; of traced arrays only shapes are checked.
    """
    _check(m, labels, per_class, cutoff, block_size)
    m = jax.lax.stop_gradient(m.astype(working_dtype(m)))
    batch, count = m.shape[0], per_class - 1
    index = jnp.arange(batch, dtype=jnp.int32)

    def of_anchor(anchor):
        x, label = anchor
        distances = pairwise_distances(x[None], m)[0]
        barred = (labels == label) | (distances < cutoff)
        last = distances + (1 + jnp.max(distances))  # behind all others, in the same order
        _, negatives = jax.lax.top_k(-jnp.where(barred, last, distances), count)
        return jnp.sort(negatives).astype(jnp.int32)

    if block_size is None:
        negatives = jax.vmap(of_anchor)((m, labels))
    else:
        negatives = jax.lax.map(of_anchor, (m, labels), batch_size=block_size)
    return Pairs(jnp.repeat(index, count), _positives(labels, count).reshape(-1), negatives.reshape(-1))


def margin_loss(
    m: jax.Array,
    labels: jax.Array,
    per_class: int,
    *,
    beta: ArrayLike = 1.2,
    margin: float = 0.2,
    cutoff: float = 0.5,
    block_size: int | None = None,
) -> tuple[jax.Array, MarginTerms]:
    """Hinge losses of distances to positives above ``beta - margin``, and to negatives below ``beta + margin``.

    For an anchor, its positive and its negative at distances ``p`` and ``q``,

        term = max(p - beta + margin, 0) + max(beta + margin - q, 0)

    and the loss is the sum of all terms over the number of pairs whose term is not 0; 0 where there is none.

    Args:
      m: Embeddings ``[batch, n]``, usually of unit length; the batch may be sharded, negatives are those of all of it.
      labels: ``[batch]`` integers, see :func:`sample_pairs`.
      per_class: Examples of a class.
      beta: Boundary between the distances of positives and negatives, ``[]``; differentiable.
      margin: Distance from the boundary that is asked for.
      cutoff: See :func:`sample_pairs`.
      block_size: See :func:`sample_pairs`; the rest takes memory for ``batch * per_class`` embeddings.

    Returns:
      The loss ``[]``, float32 or wider, NaN where a traced batch is not class-balanced; and its terms.

    Raises:
      ValueError: See :func:`sample_pairs`.
    """
    pairs = sample_pairs(m, labels, per_class, cutoff, block_size=block_size)
    m = m.astype(working_dtype(m))
    beta, anchors = jnp.asarray(beta, m.dtype), jnp.repeat(m, per_class - 1, axis=0)
    positive, negative = (
        jnp.sqrt(jnp.sum(jnp.square(anchors - m[other]), axis=1) + _SQUARE_EPS)
        for other in (pairs.positives, pairs.negatives)
    )
    pull, push = jax.nn.relu(positive - beta + margin), jax.nn.relu(beta - negative + margin)
    total, active = jnp.sum(pull + push), jnp.sum((pull > 0) | (push > 0), dtype=jnp.int32)
    loss = total / jnp.maximum(active, 1).astype(m.dtype)
    # An anchor that lacks positives has the index behind the last example in their place.
    balanced = jnp.max(pairs.positives) < m.shape[0]
    return jnp.where(balanced, loss, jnp.nan), MarginTerms(total, active)


def _positives(labels: jax.Array, count: int) -> jax.Array:
    """Returns the first ``count`` others of each example's label, int32 ``[batch, count]``; ``batch`` for missing ones.

    Reads them off the sorted labels: ``top_k`` of integers would sort ``batch`` of them for each anchor on CPUs.
    """
    labels, batch = jnp.asarray(labels), labels.shape[0]
    order = jnp.argsort(labels, stable=True).astype(jnp.int32)
    grouped = labels[order]
    start = jnp.searchsorted(grouped, grouped).astype(jnp.int32)[:, None]
    rank, nth = jnp.arange(batch, dtype=jnp.int32)[:, None] - start, jnp.arange(count, dtype=jnp.int32)[None]
    members = start + nth + (nth >= rank).astype(jnp.int32)  # without the example itself
    there = grouped.at[members].get(mode="clip") == grouped[:, None]
    others = jnp.where(there & (members < batch), order.at[members].get(mode="clip"), batch)
    return jnp.zeros_like(others).at[order].set(others, unique_indices=True)


def _check(m: jax.Array, labels: jax.Array, per_class: int, cutoff: float, block_size: int | None) -> None:
    if m.ndim != 2 or labels.shape != m.shape[:1]:
        raise ValueError(f"m, labels: expected [batch, n] and [batch], got {m.shape} and {labels.shape}")
    if per_class < 2 or m.shape[0] % per_class or m.shape[0] == per_class:
        raise ValueError(
            f"per_class: expected at least 2 examples of each of at least 2 classes, which fill the batch of "
            f"{m.shape[0]}, got {per_class}"
        )
    if not cutoff > 0:
        raise ValueError(f"cutoff: expected a distance above 0, got {cutoff}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size: expected at least 1 anchor, got {block_size}")
    if _known(labels):
        classes, counts = np.unique(np.asarray(labels), return_counts=True)
        if wrong := {int(c): int(n) for c, n in zip(classes, counts, strict=True) if n % per_class}:
            raise ValueError(f"labels: expected {per_class} examples of each class, got {wrong}")
    if _known(m) and not bool(jnp.all(jnp.isfinite(m))):
        raise ValueError("m: expected finite embeddings, got NaN or infinity")


def _known(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
