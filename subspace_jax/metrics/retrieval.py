"""Retrieval metrics: how the gallery items of a query's label rank by distance to it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from subspace_jax.linalg import nearest_rows, pairwise_sq_distances

_QUERIES_AT_A_TIME = 64


def cmc(
    query: jax.Array,
    gallery: jax.Array,
    query_labels: jax.Array,
    gallery_labels: jax.Array,
    ks: Sequence[int],
    *,
    exclude_self: bool = False,
) -> jax.Array:
    """Cumulative match characteristic: the share of queries with an item of their label among the k nearest.

    Distances are Euclidean.  Queries without an item of their label do not count.  The memory is that of
    :func:`subspace_jax.linalg.nearest_rows`.

    Args:
      query: ``[queries, n]``, floating point.
      gallery: ``[items, n]``.
      query_labels: ``[queries]`` integers.
      gallery_labels: ``[items]`` integers.
      ks: Numbers of items; above the size of the gallery all of it.
      exclude_self: Whether query ``i`` and item ``i`` are the same example, which is not to be found.

    Returns:
      One share for each of ``ks``, ``[len(ks)]``, float32 or wider; NaN where no query has a match.

    Raises:
      ValueError: Shapes do not match, ``ks`` is empty or below 1, or ``exclude_self`` comes with other numbers of
        queries than of items.
    """
    _check(query, gallery, query_labels, gallery_labels, exclude_self)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected numbers from 1, got {tuple(ks)}")
    own = jnp.arange(query.shape[0]) if exclude_self else None
    _, nearest = nearest_rows(query, gallery, min(max(ks), gallery.shape[0]), exclude=own)
    hits = (gallery_labels[nearest] == query_labels[:, None]) & (nearest < gallery.shape[0])
    at = jnp.minimum(jnp.asarray(ks), nearest.shape[1]) - 1
    found = jnp.take(jnp.cumsum(hits, axis=1) > 0, at, axis=1)
    num_matches = _num_matches(query_labels, gallery_labels)
    if exclude_self:
        num_matches -= (query_labels == gallery_labels).astype(num_matches.dtype)
    has_match = num_matches > 0
    count = jnp.sum(has_match)
    return _ratio(jnp.sum(found & has_match[:, None], axis=0), count[None])


def retrieval_map(
    query: jax.Array,
    gallery: jax.Array,
    query_labels: jax.Array,
    gallery_labels: jax.Array,
    *,
    exclude_self: bool = False,
) -> jax.Array:
    """Mean average precision: the precision at each item of a query's label, averaged over items, then over queries.

    Holds the distances of 64 queries to the gallery at a time, and sorts them.

    Args:
      query: See :func:`cmc`, as for the other arguments.
      gallery: ``[items, n]``.
      query_labels: ``[queries]``.
      gallery_labels: ``[items]``.
      exclude_self: Whether query ``i`` and item ``i`` are the same example.

    Returns:
      A scalar, float32 or wider; NaN where no query has a match.

    Raises:
      ValueError: Shapes do not match, or ``exclude_self`` comes with other numbers of queries than of items.
    """
    _check(query, gallery, query_labels, gallery_labels, exclude_self)
    rank = jnp.arange(1, gallery.shape[0] + 1)

    def average_precision(args):
        vector, label, own = args
        distances = pairwise_sq_distances(vector[None], gallery)[0]
        matches = gallery_labels == label
        if exclude_self:
            out = jnp.arange(gallery.shape[0]) == own
            distances, matches = jnp.where(out, jnp.inf, distances), matches & ~out
        _, matches = jax.lax.sort((distances, matches), num_keys=1)
        count = jnp.sum(matches)
        precision = jnp.where(matches, _ratio(jnp.cumsum(matches), rank), 0)
        return jnp.sum(precision) / jnp.maximum(count, 1).astype(precision.dtype), count > 0

    queries = (query, query_labels, jnp.arange(query.shape[0]))
    precision, has_match = jax.lax.map(average_precision, queries, batch_size=_QUERIES_AT_A_TIME)
    return jnp.sum(jnp.where(has_match, precision, 0)) / jnp.sum(has_match).astype(precision.dtype)


def recall_at_k(x: jax.Array, labels: jax.Array, ks: Sequence[int]) -> jax.Array:
    """Recall@k of metric learning: the share of examples with one of their label among the k nearest others.

    Args:
      x: ``[examples, n]``, floating point.
      labels: ``[examples]`` integers.
      ks: Numbers of neighbours.

    Returns:
      ``[len(ks)]``, see :func:`cmc`.

    Raises:
      ValueError: As :func:`cmc`.
    """
    return cmc(x, x, labels, labels, ks, exclude_self=True)


def _ratio(count, total):
    dtype = jnp.result_type(float)
    return count.astype(dtype) / total.astype(dtype)


def _num_matches(query_labels, gallery_labels):
    """Returns how many items have the label of each query."""
    ordered = jnp.sort(gallery_labels)
    left, right = (jnp.searchsorted(ordered, query_labels, side=side) for side in ("left", "right"))
    return right - left


def _check(query, gallery, query_labels, gallery_labels, exclude_self):
    for name, vectors, labels in (("query", query, query_labels), ("gallery", gallery, gallery_labels)):
        if vectors.ndim != 2 or labels.shape != vectors.shape[:1]:
            raise ValueError(
                f"{name}: expected [examples, n] and labels [examples], got {vectors.shape}, {labels.shape}"
            )
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query, gallery: expected vectors of one width, got {query.shape[1]} and {gallery.shape[1]}")
    if exclude_self and query.shape[0] != gallery.shape[0]:
        raise ValueError(f"exclude_self: expected a query for each item, got {query.shape[0]} and {gallery.shape[0]}")
