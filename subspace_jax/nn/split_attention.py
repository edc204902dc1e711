"""Causal attention to a long text whose places are split over devices."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from subspace_jax.nn.attention import attention, causal_mask


def split_attention(mesh: Mesh, axes: tuple[str, ...]) -> Callable[..., jax.Array]:
    """Returns a function in the place of :func:`attention`, for arrays split along their length.

    Each device keeps its queries, gathers the keys and values of a layer, which are all that it lacks, and computes its
    share of the result; in the backward pass the gradients of keys and values go back as sums.  Keys and values are the
    smaller, the fewer heads they have; scores are there for the device's own queries only.

    Args:
      mesh: The mesh, its axes of type Auto.
      axes: The axes along which ``[batch, length, heads, head_dim]`` is split, the slowest first.

    Returns:
      ``attend(query, key, value, *, mask, window, scale, implementation)``, causal, with the arguments of
      :func:`attention`; queries are as many as keys.  It raises a ValueError where their number does not split.
    """
    ways = math.prod(mesh.shape[axis] for axis in axes)

    def attend(query, key, value, *, mask=None, window=None, scale=None, implementation=None):
        length = query.shape[1]
        if length % ways or key.shape[1] != length:
            raise ValueError(
                f"split_attention: {length} queries and {key.shape[1]} keys don't split over {ways} devices "
                f"({', '.join(axes)}); expected equal numbers, multiples of {ways}"
            )

        def of_own_queries(query, key, value, mask):
            key, value = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (key, value))
            if mask is None:
                slots = jnp.arange(length, dtype=jnp.int32)
                own = jax.lax.axis_index(axes).astype(jnp.int32) * (length // ways) + slots[: length // ways]
                mask = causal_mask(own, own[None], slots[None], window=window)
            return attention(query, key, value, mask=mask, scale=scale, implementation=implementation)

        places = P(None, axes)
        return jax.shard_map(
            of_own_queries,
            mesh=mesh,
            in_specs=(places, places, places, P(None, None, axes)),
            out_specs=places,
            axis_names=set(axes),
            check_vma=False,
        )(query, key, value, mask)

    return attend
