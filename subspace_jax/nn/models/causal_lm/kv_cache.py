"""The cache of keys and values for decoding."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.models.causal_lm.config import CausalLMConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "positions", "valid", "length", "text_lengths"),
    meta_fields=(),
)
@dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of sequences; a token takes one slot in every sequence.

    Attributes:
      keys: ``[layers, batch, slots, kv_heads, head_dim]``, rotated.
      values: The same shape.
      positions: ``[batch, slots]`` int32.
      valid: ``[batch, slots]`` bool; False for padding.
      length: Number of filled slots, int32.
      text_lengths: ``[batch]`` integers, see :func:`causal_lm_apply`; None where they were not given.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    valid: jax.Array
    length: jax.Array
    text_lengths: jax.Array | None = None

    @property
    def slots(self) -> int:
        """Number of tokens that fit."""
        return self.positions.shape[1]


def init_cache(config: CausalLMConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """Returns an empty cache.

    Args:
      config: The model.
      batch: Number of sequences.
      slots: Number of tokens that fit, padding included.  It may exceed ``config.max_length``, which bounds positions.
      dtype: Dtype of keys and values; that of the activations.

    Raises:
      ValueError: ``batch`` or ``slots`` is below 1.
    """
    if batch < 1 or slots < 1:
        raise ValueError(f"init_cache: expected at least 1 sequence and 1 slot, got {batch} and {slots}")
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )
