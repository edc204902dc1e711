"""What is gained by the update of an embedding model, and on the way to it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def update_gain(cross: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Share of an update's gain that is had without recomputing the gallery (arXiv 2112.02805, section 3).

    Args:
      cross: Metric of new queries in the old gallery.
      old: That of old queries in the old gallery.
      new: That of new queries in the new gallery.

    Returns:
      ``(cross - old) / (new - old)``: 0 for the old model, 1 for the new one, and above 0 where the update is backward
      compatible.
    """
    return (cross - old) / (new - old)


def backfill_curve(
    measure: Callable[[jax.Array], jax.Array],
    mapped: jax.Array,
    new: jax.Array,
    order: jax.Array,
    shares: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Metric of a gallery whose items are re-embedded in an order, over the share of items that have been.

    Args:
      measure: Maps a gallery ``[items, n]`` to a scalar.
      mapped: Old vectors in the new space, ``[items, n]``.
      new: New vectors of the same items, ``[items, n]``.
      order: Indices of the items in the order of re-embedding, ``[items]`` integers.
      shares: Shares in [0, 1], ascending, ``[points]``.

    Returns:
      The metric at each share, ``[points]``, and the area under the curve: its trapezoids over the range of the
      shares, divided by that range.

    Raises:
      ValueError: Shapes do not match, or there are fewer than two shares.
    """
    if mapped.shape != new.shape or order.shape != mapped.shape[:1]:
        raise ValueError(
            f"mapped, new, order: expected [items, n] twice and [items], got {mapped.shape}, {new.shape} and "
            f"{order.shape}"
        )
    if shares.ndim != 1 or shares.shape[0] < 2:
        raise ValueError(f"shares: expected at least two, got shape {list(shares.shape)}")
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))

    def at(share):
        done = rank < jnp.round(share * order.shape[0]).astype(rank.dtype)
        return measure(jnp.where(done[:, None], new, mapped))

    values = jax.lax.map(at, shares)
    width = (shares[1:] - shares[:-1]).astype(values.dtype)
    return values, jnp.sum(width * (values[1:] + values[:-1]) / 2) / jnp.sum(width)
