"""Features and examples over the devices of a mesh, inside ``shard_map``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shards(NamedTuple):
    """The mesh axes over which a loss is sharded; none by default, and then nothing is communicated.

    Attributes:
      batch: Those that shard examples.
      features: Those that shard the features.
    """

    batch: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.batch, *self.features)


def total(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sums over the devices along mesh axes."""
    return jax.lax.psum(x, axes) if axes else x


def gathered_last(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Concatenates along the last axis what the devices along mesh axes hold."""
    return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True) if axes else x


def before(count: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sums what the devices before this one along mesh axes hold."""
    if not axes:
        return jnp.zeros_like(count)
    everywhere = jax.lax.all_gather(count, axes)
    earlier = jnp.arange(everywhere.shape[0]) < jax.lax.axis_index(axes)
    return jnp.sum(jnp.where(earlier.reshape(-1, *[1] * count.ndim), everywhere, 0), axis=0, dtype=count.dtype)


def first_feature(features: int, axes: tuple[str, ...]) -> jax.Array | int:
    """Returns the number of the first of the features that this device holds."""
    return jax.lax.axis_index(axes) * features if axes else 0
