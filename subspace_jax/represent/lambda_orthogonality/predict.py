"""What an upgrade will be worth, from the pairs alone: no further vector is computed."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg, metrics
from subspace_jax.represent.lambda_orthogonality.core import Affine, backfill_scores
from subspace_jax.represent.lambda_orthogonality.maps import (
    ORDERS,
    Chain,
    centers_of,
    fit_backward,
    fit_ridge,
    map_forward,
    penalties,
    prepared,
    ranked,
    widths,
)

SHARES = tuple(i / 10 for i in range(11))
FOLDS = 10
# A larger sample says no more, and takes time with its square.
MOST_ITEMS = 5000


class Prediction(NamedTuple):
    """What queries of the new model find: recall of the nearest ``k`` that they find in vectors of their own model.

    Attributes:
      k: Number of neighbours.
      items: Items of the gallery in which all was measured.
      shares: Shares of re-embedded items, ``[points]``.
      curves: Recall at each share in each order: "worst" and "typical" items first (see :func:`ranked`), and "random".
      areas: Areas under these curves.
      order: The order of the first two with the larger area.
      old: Recall of old queries among old vectors: what the store gives before the upgrade.
      unmapped: Recall of new queries among old vectors without a map, zeros at the end of the narrower ones.
      backward: Recall of new queries that are mapped backward, among old vectors.
      kept: Recall of new queries among new vectors, all of them mapped backward.
      sizes: Items of smaller galleries, and of this one.
      recalls: Recall among mapped vectors in each of these.
    """

    k: int
    items: int
    shares: tuple[float, ...]
    curves: dict[str, tuple[float, ...]]
    areas: dict[str, float]
    order: str
    old: float
    unmapped: float
    backward: float
    kept: float
    sizes: tuple[int, ...]
    recalls: tuple[float, ...]

    @property
    def mapped(self) -> float:
        """Recall of new queries among old vectors that are mapped forward, before any is re-embedded."""
        return self.curves["random"][0]

    @property
    def at_chance(self) -> bool:
        """Whether recall of mapped vectors is at chance level, as where old and new rows are not paired.

        Chance finds ``k`` of all other items.  That and 2 % of the rest are allowed, and 2.5 standard errors over the
        queries, whose hits count as one: neighbours are often found together.
        """
        chance = self.k / (self.items - 1)
        return self.mapped < chance + 0.02 * (1 - chance) + 2.5 * (chance * (1 - chance) / self.items) ** 0.5

    def recall_among(self, items: int) -> float:
        """Recall among mapped vectors of another number of items, by a line over the logarithm of their number."""
        slope, start = np.polyfit(np.log(self.sizes), self.recalls, 1)
        return float(np.clip(start + slope * np.log(items), 0, 1))


def predict(
    key: jax.Array, old: jax.Array, new: jax.Array, labels: jax.Array, *, k: int, metric: str, lam: float
) -> Prediction:
    """Predicts what an upgrade is worth, by maps that know neither the query nor the item.

    In each of ten folds the forward map is fitted without a tenth of the pairs, whose new vectors are the queries.  Of
    the items that it was fitted to, each is mapped by the fit without it.  The gallery so has all items.

    Args:
      key: Key of folds and orders.
      old: ``[pairs, m]``, prepared for the metric; 5,000 of more are drawn.
      new: ``[pairs, n]``, likewise.
      labels: Classes, ``[pairs]`` int32.
      k: Number of neighbours.
      metric: "cosine" or "l2".
      lam: See :func:`fit_backward`.
    """
    order_key, random_key, backward_key = jax.random.split(key, 3)
    drawn = jax.random.permutation(order_key, len(old))[: min(len(old), MOST_ITEMS)]
    old, new, labels = old[drawn], new[drawn], labels[drawn]
    items = len(drawn)
    own = jnp.arange(items)
    truth, before, unmapped = _without_maps(old, new, k=k)
    whole = fit_ridge(old, new, jnp.ones(items), penalties())
    outside = prepared(whole.outside, metric)
    scores = backfill_scores(outside, centers_of(outside, labels))
    random = jax.random.permutation(random_key, items).astype(jnp.int32)
    orders = jnp.stack([*(ranked(scores, name) for name in ORDERS), random])
    count = items // FOLDS
    folds = [own[i * count : (i + 1) * count] for i in range(FOLDS)]
    found = [_fold(old, new, fold, truth, orders, whole.penalty, metric=metric) for fold in folds]
    values, areas, recalls = (np.mean(x, axis=0) for x in zip(*jax.device_get(found), strict=True))
    curves = {name: tuple(map(float, x)) for name, x in zip((*ORDERS, "random"), values, strict=True)}
    areas = dict(zip(curves, map(float, areas), strict=True))
    weights = jnp.ones(items).at[folds[0]].set(0.0)
    backward = fit_backward(backward_key, old, new, labels, weights, lam=lam)
    mapped, kept = _backward(backward, old, new, folds[0], truth, metric=metric)
    return Prediction(
        k=k,
        items=items,
        shares=SHARES,
        curves=curves,
        areas=areas,
        order=max(ORDERS, key=areas.get),
        old=float(before),
        unmapped=float(unmapped),
        backward=float(mapped),
        kept=float(kept),
        sizes=(*_sizes(items, count, k), items),
        recalls=(*map(float, recalls), curves["random"][0]),
    )


def neighbour_recall(queries: jax.Array, gallery: jax.Array, truth: jax.Array, own: jax.Array) -> jax.Array:
    """Share of the true neighbours of each query among as many nearest items of a gallery, averaged over queries.

    Args:
      queries: ``[queries, n]``.
      gallery: ``[items, n]``.
      truth: Indices of the true neighbours, ``[queries, k]``.
      own: Index of the item that is the query itself and is not to be found, ``[queries]``; -1 for none.
    """
    _, found = linalg.nearest_rows(queries, gallery, truth.shape[1], exclude=own)
    return jnp.mean(jnp.any(found[:, :, None] == truth[:, None], axis=1).astype(queries.dtype))


@functools.partial(jax.jit, static_argnames="k")
def _without_maps(old, new, *, k):
    """Returns the true neighbours of each item, recall of old queries, and recall of new ones among old vectors."""
    own, width = jnp.arange(len(old)), max(old.shape[1], new.shape[1])
    _, truth = linalg.nearest_rows(new, new, k, exclude=own)
    queries, gallery = (jnp.pad(h, ((0, 0), (0, width - h.shape[1]))) for h in (new, old))
    return truth, neighbour_recall(old, old, truth, own), neighbour_recall(queries, gallery, truth, own)


@functools.partial(jax.jit, static_argnames="metric")
def _fold(old, new, held, truth, orders, penalty, *, metric):
    """Returns curves and areas of some orders for the queries ``held``, and recall in smaller galleries."""
    items, k = len(old), truth.shape[1]
    weights = jnp.ones(items).at[held].set(0.0)
    mapped = prepared(fit_ridge(old, new, weights, penalty[None]).outside, metric)
    queries = new[held]

    def recall(gallery):
        return neighbour_recall(queries, gallery, truth[held], held)

    shares = jnp.asarray(SHARES)
    curves, areas = jax.lax.map(lambda order: metrics.backfill_curve(recall, mapped, new, order, shares), orders)
    rest = jnp.argsort(-weights, stable=True)  # items of the fit first
    recalls = []
    for size in _sizes(items, len(held), k):
        some, none = rest[:size], jnp.full_like(held, -1)
        _, nearest = linalg.nearest_rows(queries, new[some], k)
        recalls.append(neighbour_recall(queries, mapped[some], nearest, none))
    return curves, areas, jnp.stack(recalls)


def _sizes(items: int, held: int, k: int) -> tuple[int, ...]:
    """Sizes of smaller galleries, without the queries' own items."""
    return tuple(max(k, (items - held) // part) for part in (4, 2))


@functools.partial(jax.jit, static_argnames="metric")
def _backward(backward: Affine, old, new, held, truth, *, metric):
    """Returns recall of the queries ``held``, mapped backward, among old vectors and among mapped new ones."""
    mapped = prepared(backward(new), metric)
    return [neighbour_recall(mapped[held], gallery, truth[held], held) for gallery in (old, mapped)]


def check_chain(chains: Sequence[Chain], spaces: Sequence[np.ndarray], k: int) -> list[dict[str, float]]:
    """Measures what each upgrade costs of several that are applied one after another.

    Args:
      chains: The upgrades, the oldest first; each begins in the space in which the one before ends.
      spaces: Vectors of the same items by each model, the oldest first: one more than there are upgrades.
      k: Number of neighbours.

    Returns:
      A dict for each upgrade: ``alone``, recall of new queries among items mapped by it, in the space it maps to;
      ``from_here``, recall among items mapped by it and all later ones, in the newest space; and ``cost``, what it
      takes away from that recall.

    Raises:
      ValueError: The vectors are not of these models, or not of the same items.
    """
    expected = [widths(chain)[0] for chain in chains] + [widths(chains[-1])[-1]]
    got = [x.shape[1] for x in spaces]
    if got != expected:
        raise ValueError(f"check: expected vectors of widths {expected}, a file for each model, got {got}")
    if len({len(x) for x in spaces}) > 1:
        raise ValueError(f"check: expected the vectors of the same items, got {[len(x) for x in spaces]} vectors")
    if len(spaces[0]) <= k:
        raise ValueError(f"check: expected more than {k} vectors, got {len(spaces[0])}")
    spaces = [prepared(jnp.asarray(x), chains[0].metric) for x in spaces]
    own, rows, before = jnp.arange(len(spaces[0])), [], 1.0
    truths = [linalg.nearest_rows(x, x, k, exclude=own)[1] for x in spaces[1:]]
    for i in reversed(range(len(chains))):
        mapped = map_forward(chains[i], spaces[i])
        alone = neighbour_recall(spaces[i + 1], mapped, truths[i], own)
        for chain in chains[i + 1 :]:
            mapped = map_forward(chain, mapped)
        from_here = float(neighbour_recall(spaces[-1], mapped, truths[-1], own))
        rows.insert(0, {"alone": float(alone), "from_here": from_here, "cost": before - from_here})
        before = from_here
    return rows
