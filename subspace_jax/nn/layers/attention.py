"""Attention with grouped queries: causal with windows, padding and packed sequences, or to everything."""

import functools
import math

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype

IMPLEMENTATIONS = (None, "xla", "cudnn")
BLOCK = 1024


def causal_mask(
    query_slots: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    window: jax.Array | int | None = None,
    key_valid: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
) -> jax.Array:
    """Says which query sees which key.

    A query sees the keys in its own and in earlier slots, except those that are padding, belong to another segment, or
    lie ``window`` or more positions back.  It always sees itself: a row that sees nothing has no softmax, and what
    a padded query returns only has to be finite.

    Args:
      query_slots: Place of each query among the keys, ``[length]`` integers.
      query_positions: Positions of the queries, ``[batch or 1, length]`` integers.
      key_positions: Positions of the keys, ``[batch or 1, slots]``.
      window: Positions that a query sees, itself included; may be traced.
      key_valid: ``[batch, slots]`` bool, False for padding.
      query_segments: ``[batch, length]`` integers.
      key_segments: ``[batch, slots]`` integers.

    Returns:
      ``[batch or 1, 1, length, slots]`` bool.
    """
    behind = query_slots[:, None] - jnp.arange(key_positions.shape[1], dtype=query_slots.dtype)[None, :]
    sees = (behind >= 0)[None]
    if window is not None:
        sees = sees & (query_positions[:, :, None] - key_positions[:, None, :] < window)
    if key_valid is not None:
        sees = sees & key_valid[:, None, :]
    if query_segments is not None:
        sees = sees & (query_segments[:, :, None] == key_segments[:, None, :])
    return (sees | (behind == 0)[None])[:, None]


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention with softmax in float32.

    Query head ``a`` uses key and value head ``a // (heads / kv_heads)``.

    Args:
      query: ``[batch, length, heads, head_dim]``.
      key: ``[batch, slots, kv_heads, head_dim]``.
      value: ``[batch, slots, kv_heads, head_dim]``.
      mask: ``[batch or 1, 1, length, slots]`` bool; None for plain causal attention, where ``slots == length``, or
        without ``causal`` for attention to everything.
      window: Of plain causal attention: how many tokens a query sees, itself included.
      causal: Whether a query without a mask sees its own and earlier slots only.
      scale: Factor of the scores; ``1 / sqrt(head_dim)`` by default.
      implementation: "xla", which takes blocks of queries one by one where there are 2048 or more; "cudnn" for
        NVIDIA's flash attention, which keeps no scores (bfloat16 and float16 only); None for "cudnn" on a GPU where
        attention is plain and its dtype and width serve, and "xla" elsewhere.

    Returns:
      The shape and dtype of ``query``.

    Raises:
      ValueError: ``implementation`` is unknown, or heads don't divide.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} for attention, got {implementation!r}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"attention: {query.shape[2]} query heads can't share {key.shape[2]} key heads evenly")

    if implementation == "cudnn":
        return _cudnn(query, key, value, mask, window, causal, scale)
    xla = functools.partial(_xla, mask=mask, window=window, causal=causal, scale=scale)
    cudnn = functools.partial(_cudnn, mask=None, window=window, causal=causal, scale=scale)
    if implementation is None and mask is None and _cudnn_serves(cudnn, query, key, value):
        return jax.lax.platform_dependent(query, key, value, cuda=cudnn, default=xla)
    return xla(query, key, value)


def _xla(query, key, value, mask, window, causal, scale) -> jax.Array:
    # JAX's own version asks for a dot algorithm whose gradient can't be lowered under strict dtype promotion
    # (bfloat16, JAX 0.10.2), and it keeps the scores of all queries at once.
    batch, length, _, head_dim = query.shape
    if mask is None and causal:
        slots = jnp.arange(length, dtype=jnp.int32)
        mask = causal_mask(slots, slots[None], slots[None], window=window)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    # Heads first, and the queries that share a key head in one axis with their places: both products then are plain
    # batches of matrices.  With heads between the axes that are contracted a CPU takes twice as long.
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

    # As flash attention does, the backward pass makes the scores again: kept, they outweigh all else of a layer.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some(queries_and_mask):
        grouped, mask = queries_and_mask
        flat = grouped.reshape(*grouped.shape[:2], -1, head_dim)
        scores = scale * jnp.einsum("bktd,bksd->bkts", flat, key, preferred_element_type=working_dtype(query))
        if mask is not None:
            scores = scores.reshape(*grouped.shape[:4], -1)
            scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
            scores = scores.reshape(*flat.shape[:3], -1)
        # Weights that add up to one only once values are mixed: scores are passed over once less, in each direction.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bkts,bksd->bktd", weights.astype(value.dtype), value, preferred_element_type=total.dtype)
        return (mixed / total).astype(value.dtype).reshape(grouped.shape)

    if length < 2 * BLOCK or length % BLOCK:
        mixed = some((grouped, mask))
    else:
        # Of a long text the scores of one block of queries are there at a time, in the backward pass too.
        count = length // BLOCK
        blocks = grouped.reshape(*grouped.shape[:3], count, BLOCK, head_dim)
        blocks = jnp.moveaxis(blocks, 3, 0)
        masks = None if mask is None else jnp.moveaxis(mask.reshape(*mask.shape[:2], count, BLOCK, -1), 2, 0)
        mixed = jnp.moveaxis(jax.lax.map(some, (blocks, masks)), 0, 3)
    return mixed.reshape(grouped.shape).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _cudnn(query, key, value, mask, window, causal, scale) -> jax.Array:
    plain = {"is_causal": causal} if mask is None else {"mask": mask}
    if mask is None and causal and window is not None:
        plain["local_window_size"] = (window - 1, 0)
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn", **plain)


def _cudnn_serves(cudnn, query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] % 8 or query.shape[-1] > 128:
        return False
    try:
        jax.eval_shape(cudnn, query, key, value)
    except RuntimeError:  # JAX traces a call of cuDNN only where the library is installed.
        return False
    return True
