"""Causal attention for activations that are sharded along the sequence."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from subspace_jax.nn.layers.attention import attention, causal_mask


def sequence_attention(
    mesh: Mesh,
    sequence_axes: tuple[str, ...],
    *,
    batch_axes: tuple[str, ...] = (),
    head_axes: tuple[str, ...] = (),
) -> Callable[..., jax.Array]:
    """Returns a replacement of :func:`attention` for arrays sharded along the sequence.

    Each device all-gathers the keys and values of a layer and computes attention for its own queries; the backward pass
    reduce-scatters the gradients of keys and values.  Scores exist for the device's own queries only.

    Args:
      mesh: The mesh, its axes of type Auto.
      sequence_axes: Mesh axes over which the sequence of ``[batch, length, heads, head_dim]`` is sharded, the slowest
        first.
      batch_axes: Mesh axes over which the batch is sharded.
      head_axes: Mesh axes over which heads are sharded, where they divide the key heads.

    Returns:
      ``attend(query, key, value, *, mask, window, scale, softcap)``, causal, with arguments as in :func:`attention` and
      as many queries as keys.  It raises a ValueError where their number is no multiple of the shards.
    """

    def num_shards(axes):
        return math.prod(mesh.shape[axis] for axis in axes)

    def attend(query, key, value, *, mask=None, window=None, scale=None, softcap=None):
        length, shards = query.shape[1], num_shards(sequence_axes)
        if length % shards or key.shape[1] != length:
            raise ValueError(
                f"sequence_attention: expected equal numbers of queries and keys, multiples of {shards} devices "
                f"({', '.join(sequence_axes)}), got {length} and {key.shape[1]}"
            )

        def own_queries(query, key, value, mask):
            key, value = (jax.lax.all_gather(x, sequence_axes, axis=1, tiled=True) for x in (key, value))
            if mask is None:
                slots = jnp.arange(length, dtype=jnp.int32)
                count = query.shape[1]
                own = jax.lax.axis_index(sequence_axes).astype(jnp.int32) * count + slots[:count]
                mask = causal_mask(own, own[None], slots[None], window=window)
            return attention(query, key, value, mask=mask, scale=scale, softcap=softcap)

        # Mesh axes that shard an array have to be manual: the compiler would gather over the others.
        sharded_heads = head_axes if key.shape[2] % num_shards(head_axes) == 0 else ()
        spec = P(batch_axes, sequence_axes, sharded_heads)
        mask_spec = P(batch_axes if mask is not None and mask.shape[0] > 1 else None, None, sequence_axes)
        return jax.shard_map(
            own_queries,
            mesh=mesh,
            in_specs=(spec, spec, spec, mask_spec),
            out_specs=spec,
            axis_names={*batch_axes, *sequence_axes, *sharded_heads},
            check_vma=False,
        )(query, key, value, mask)

    return attend
