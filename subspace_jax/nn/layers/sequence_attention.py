"""Causal attention to a long text whose places are split over devices."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from subspace_jax.nn.layers.attention import attention, causal_mask


def sequence_attention(
    mesh: Mesh, places: tuple[str, ...], *, rows: tuple[str, ...] = (), heads: tuple[str, ...] = ()
) -> Callable[..., jax.Array]:
    """Returns a function in the place of :func:`attention`, for arrays split along their length.

    Each device keeps its queries, gathers the keys and values of a layer, which are all that it lacks, and computes its
    share of the result; in the backward pass the gradients of keys and values go back as sums.  Keys and values are the
    smaller, the fewer heads they have; scores are there for the device's own queries only.

    Args:
      mesh: The mesh, its axes of type Auto.
      places: The axes along which ``[batch, length, heads, head_dim]`` is split by places, the slowest first.
      rows: Those by which it is split by rows.
      heads: Those by which it is split by heads, where they divide the heads of the keys.

    Returns:
      ``attend(query, key, value, *, mask, window, scale, implementation)``, causal, with the arguments of
      :func:`attention`; queries are as many as keys.  It raises a ValueError where their number does not split.
    """

    def ways(axes):
        return math.prod(mesh.shape[axis] for axis in axes)

    def attend(query, key, value, *, mask=None, window=None, scale=None, implementation=None):
        length = query.shape[1]
        if length % ways(places) or key.shape[1] != length:
            raise ValueError(
                f"sequence_attention: {length} queries and {key.shape[1]} keys don't split over {ways(places)} devices "
                f"({', '.join(places)}); expected equal numbers, multiples of {ways(places)}"
            )

        def of_own_queries(query, key, value, mask):
            key, value = (jax.lax.all_gather(x, places, axis=1, tiled=True) for x in (key, value))
            if mask is None:
                slots = jnp.arange(length, dtype=jnp.int32)
                count = query.shape[1]
                own = jax.lax.axis_index(places).astype(jnp.int32) * count + slots[:count]
                mask = causal_mask(own, own[None], slots[None], window=window)
            return attention(query, key, value, mask=mask, scale=scale, implementation=implementation)

        # All axes that split something are named: what the compiler may arrange by itself in there, it gathers.
        split_heads = heads if key.shape[2] % ways(heads) == 0 else ()
        split = P(rows, places, split_heads)
        of_mask = P(rows if mask is not None and mask.shape[0] > 1 else None, None, places)
        return jax.shard_map(
            of_own_queries,
            mesh=mesh,
            in_specs=(split, split, split, of_mask),
            out_specs=split,
            axis_names={*rows, *places, *split_heads},
            check_vma=False,
        )(query, key, value, mask)

    return attend
