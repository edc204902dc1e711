"""Attention with grouped queries: causal, with windows, padding and packed sequences, or bidirectional."""

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
    """Returns the mask of causal attention.

    A query attends to the keys in its own and in earlier slots, except padding, keys of other segments, and keys
    ``window`` or more positions back.  It always attends to itself, so that the output of padding is finite.

    Args:
      query_slots: Index of each query among the keys, ``[length]`` integers.
      query_positions: Positions of the queries, ``[batch or 1, length]`` integers.
      key_positions: Positions of the keys, ``[batch or 1, slots]``.
      window: Number of positions that a query attends to, its own included; may be traced.
      key_valid: ``[batch, slots]`` bool, False for padding.
      query_segments: ``[batch, length]`` integers.
      key_segments: ``[batch, slots]`` integers.

    Returns:
      ``[batch or 1, 1, length, slots]`` bool, True where a query attends to a key.
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
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention with softmax in float32.

    Query head ``a`` uses key and value head ``a // (heads / kv_heads)``.

    Args:
      query: ``[batch, length, heads, head_dim]``.
      key: ``[batch, slots, kv_heads, head_dim]``.
      value: ``[batch, slots, kv_heads, head_dim]``.
      mask: ``[batch or 1, 1, length, slots]`` bool, True where a query attends to a key.
      window: Number of tokens that a query attends to, itself included; only for causal attention without a mask.
      causal: Without a mask: whether attention is causal, where ``slots == length``, or bidirectional.
      scale: Factor of the scores; ``1 / sqrt(head_dim)`` by default.
      softcap: Bound of the scores, which become ``softcap * tanh(scores / softcap)`` (arXiv 2408.00118).
      implementation: "xla", which computes 2048 queries or more in blocks; "cudnn" for flash attention on NVIDIA GPUs
        (bfloat16 and float16, without ``softcap``); None for "cudnn" in programs for NVIDIA GPUs, where there is no
        mask, cuDNN is installed and supports the arguments, and "xla" otherwise.

    Returns:
      The shape and dtype of ``query``.

    Raises:
      ValueError: ``implementation`` is unknown or does not support ``softcap``, or ``kv_heads`` does not divide
        ``heads``.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS} for attention, got {implementation!r}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"attention: {query.shape[2]} query heads are no multiple of {key.shape[2]} key heads")

    if implementation == "cudnn":
        if softcap is not None:
            raise ValueError("implementation: 'cudnn' does not support softcap; expected None or 'xla'")
        return _cudnn(query, key, value, mask, window, causal, scale)
    sees = mask
    if mask is None and causal:
        slots = jnp.arange(query.shape[1], dtype=jnp.int32)
        sees = causal_mask(slots, slots[None], slots[None], window=window)
    xla = functools.partial(_xla, mask=sees, scale=scale, softcap=softcap)
    cudnn = functools.partial(_cudnn, mask=None, window=window, causal=causal, scale=scale)
    if implementation is None and mask is None and softcap is None and _cudnn_serves(cudnn, query, key, value):
        return jax.lax.platform_dependent(query, key, value, cuda=cudnn, default=xla)
    return xla(query, key, value)


def _xla(query, key, value, mask, scale, softcap) -> jax.Array:
    # jax.nn.dot_product_attention requests a dot algorithm whose gradient can't be lowered under strict dtype promotion
    # (bfloat16, JAX 0.10.2), and stores the scores of all queries at once.
    batch, length, _, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    # Heads first, and the query heads of a key head in one axis with their positions: both einsums are batched matmuls.
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)

    # The backward pass recomputes the scores, as in flash attention.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(queries_and_mask):
        grouped, mask = queries_and_mask
        flat = grouped.reshape(*grouped.shape[:2], -1, head_dim)
        scores = scale * jnp.einsum("bktd,bksd->bkts", flat, key, preferred_element_type=working_dtype(query))
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if mask is not None:
            scores = scores.reshape(*grouped.shape[:4], -1)
            scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
            scores = scores.reshape(*flat.shape[:3], -1)
        # Normalized after the values are mixed, which saves a pass over the scores in each direction.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bkts,bksd->bktd", weights.astype(value.dtype), value, preferred_element_type=total.dtype)
        return (mixed / total).astype(value.dtype).reshape(grouped.shape)

    if length < 2 * BLOCK or length % BLOCK:
        mixed = attend((grouped, mask))
    else:
        # One block of queries at a time, in the backward pass too.
        count = length // BLOCK
        blocks = grouped.reshape(*grouped.shape[:3], count, BLOCK, head_dim)
        blocks = jnp.moveaxis(blocks, 3, 0)
        masks = None if mask is None else jnp.moveaxis(mask.reshape(*mask.shape[:2], count, BLOCK, -1), 2, 0)
        mixed = jnp.moveaxis(jax.lax.map(attend, (blocks, masks)), 0, 3)
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
