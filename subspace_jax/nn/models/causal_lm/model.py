"""Causal language models: one decoder for GPT-2, Llama, Mistral and Qwen2, as pure functions.

Layers are stacked along a leading axis and run by ``jax.lax.scan``: a program's size does not grow with the depth.  Or
they are a tuple, see :func:`subspace_jax.nn.unstack_layers`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.layers.attention import attention, causal_mask
from subspace_jax.nn.layers.embedding import embed, table_dtype, unembed
from subspace_jax.nn.layers.kv_cache import KVCache
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.norms import layer_norm, rms_norm
from subspace_jax.nn.layers.rope import apply_rope, rope_tables
from subspace_jax.nn.layers.stacking import REMAT, run_layers
from subspace_jax.nn.models.causal_lm.config import ACTIVATIONS, CausalLMConfig

PyTree = Any


class CausalLMOutput(NamedTuple):
    """What a model returns.

    Attributes:
      final: Residual stream after the last block and the final norm, ``[batch, length, d]``.
      logits: Scores of the next token, ``[batch, length, vocab]``; None without ``with_logits``.
      hidden: ``[layers + 1, batch, length, d]``: the embedding's output, then that of each block, but ``final`` in the
        last place; None without ``capture_hidden``.
      cache: The cache with these tokens added; None where none was given.
    """

    final: jax.Array
    logits: jax.Array | None = None
    hidden: jax.Array | None = None
    cache: KVCache | None = None


def causal_lm_apply(
    config: CausalLMConfig,
    params: PyTree,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    dtype: DTypeLike | None = None,
    logits_dtype: DTypeLike | None = None,
    with_logits: bool = True,
    capture_hidden: bool = False,
    remat: str = "none",
    on_layer: Callable[[PyTree], PyTree] | None = None,
    on_stream: Callable[[jax.Array], jax.Array] | None = None,
    attend_with: Callable[..., jax.Array] = attention,
    implementation: str | None = None,
    unroll: int = 1,
) -> CausalLMOutput:
    """Reads a batch of token sequences.

    Works under ``jit``, ``grad`` and ``vmap``, with any kernel that :func:`subspace_jax.nn.linear` takes; the arrays of
    a structured kernel inside ``params["layers"]`` are stacked by layer like all others.  Norms, rotary angles and the
    softmax are computed in float32.  On a mesh the axes are of type Auto.

    Args:
      config: The model.
      params: Nested dict, as :func:`causal_lm_specs` lays it out, its layers stacked or not
        (:func:`unstack_layers`).
      tokens: ``[batch, length]`` integers.  A token outside the vocabulary gives NaN; see :func:`check_tokens`.
      attention_mask: ``[batch, length]``, nonzero for tokens and zero for padding, on either side.
      positions: ``[batch, length]`` integers; by default the tokens that are not padding are counted, from 0, within
        their segment, and on from those in the cache.
      segment_ids: ``[batch, length]`` integers: several texts in a row, none of which sees another.
      cache: What was read before; the tokens go into its next slots, which have to be free.
      dtype: Type of the activations, that of the embedding by default; parameters are rounded as they are used.
      logits_dtype: Type of the logits, ``dtype`` by default; with float32 they are accumulated and kept so.
      with_logits: Whether logits are wanted; a loss over many words may rather call :func:`causal_lm_logits` on parts
        of ``final``.
      capture_hidden: Whether to keep the stream after every block.
      remat: What the backward pass finds of each layer: "none" keeps all that the compiler wants, "dots" the products
        with kernels, "full" nothing but the layer's input.
      on_layer: Applied to the parameters of one layer (leading axis gone) where the layer is run, within what ``remat``
        runs again.  This is where sharded weights are gathered, and cast before that: gathered ahead of the scan, all
        layers would be whole at once; and with ``remat="none"`` the backward pass would keep them so.
      on_stream: Applied to the residual stream ``[batch, length, d]`` before the first and after every block: the place
        of a sharding constraint.
      attend_with: What attends; :func:`subspace_jax.nn.sequence_attention` makes one for places split over devices.
      implementation: Of :func:`subspace_jax.nn.attention`.
      unroll: Stacked layers in one turn of the loop.

    Returns:
      The output.

    Raises:
      ValueError: The sequence is longer than the model allows or than the cache, shapes don't match, ``remat`` is
        unknown, or segments are combined with a cache.
      TypeError: Tokens are not integers.
    """
    _check(config, tokens, attention_mask, positions, segment_ids, cache, remat)
    batch, length = tokens.shape
    valid = None if attention_mask is None else attention_mask.astype(bool)
    # Plain causal attention needs no mask, whatever the positions are, unless a window counts them.
    plain = valid is None and segment_ids is None and cache is None and not config.windows_differ
    plain = plain and (positions is None or config.window is None)
    if positions is None:
        positions = _positions(length, valid, segment_ids, cache)
    dtype = table_dtype(params["embed"]["embedding"]) if dtype is None else dtype

    x = embed(tokens, params["embed"]["embedding"], dtype)
    if config.rope is None:
        x = x + jnp.broadcast_to(embed(positions, params["position"]["embedding"], dtype), x.shape)
    on_stream = on_stream or (lambda x: x)
    x = on_stream(x)

    slots = jnp.arange(length, dtype=jnp.int32)
    key_positions, key_valid = positions, valid
    if cache is not None:
        slots = cache.length + slots
        cache = _extend(cache, positions, valid, batch)
        key_positions, key_valid = cache.positions, cache.valid
    tables = None if config.rope is None else rope_tables(config.rope, config.head_dim, positions)

    def mask_of(window):
        return _mask(slots, positions, key_positions, window, key_valid, segment_ids)

    mask = None if plain or config.windows_differ else mask_of(config.window)
    zero = jnp.int32(0)

    def block(carry, xs):
        x, keys, values = carry
        layer = on_layer(xs["params"]) if on_layer is not None else xs["params"]

        def attend(query, key, value):
            nonlocal keys, values
            if cache is not None:
                start = (xs["index"], zero, cache.length - length, zero, zero)
                keys = jax.lax.dynamic_update_slice(keys, key[None].astype(keys.dtype), start)
                values = jax.lax.dynamic_update_slice(values, value[None].astype(values.dtype), start)
                key, value = (jax.lax.dynamic_index_in_dim(c, xs["index"], keepdims=False) for c in (keys, values))
                key, value = key.astype(query.dtype), value.astype(query.dtype)
            if config.scale_by_layer:
                query = query / (xs["index"] + 1).astype(query.dtype)
            return attend_with(
                query,
                key,
                value,
                mask=mask_of(xs["window"]) if config.windows_differ else mask,
                window=config.window,
                scale=None if config.scale_scores else 1.0,
                implementation=implementation,
            )

        x = x + _attention_block(config, layer["attn"], _norm(config, layer["attn_norm"], x), tables, attend)
        x = x + _mlp(config, layer["mlp"], _norm(config, layer["mlp_norm"], x))
        x = on_stream(x)
        return (x, keys, values), (x if capture_hidden else None)

    others = {"index": jnp.arange(config.num_layers, dtype=jnp.int32)}
    if config.windows_differ:
        everything = jnp.iinfo(jnp.int32).max
        others["window"] = jnp.array([w or everything for w in config.windows], jnp.int32)
    before = x
    carry = (x, None, None) if cache is None else (x, cache.keys, cache.values)
    (x, keys, values), after = run_layers(block, carry, params["layers"], others, remat=remat, unroll=unroll)
    final = _norm(config, params["norm"], x)

    return CausalLMOutput(
        final=final,
        logits=causal_lm_logits(config, params, final, logits_dtype) if with_logits else None,
        hidden=jnp.concatenate([before[None], after[:-1], final[None]]) if capture_hidden else None,
        cache=None
        if cache is None
        else KVCache(keys=keys, values=values, positions=cache.positions, valid=cache.valid, length=cache.length),
    )


def causal_lm_logits(
    config: CausalLMConfig, params: PyTree, final: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    """Scores the next token: ``[..., d]``, after the final norm, to ``[..., vocab]``.

    Args:
      config: The model.
      params: Its parameters; of a tied model the embedding is used, otherwise the head.
      final: ``final`` of the output, or any part of it.
      dtype: Type of the logits, that of ``final`` by default.
    """
    if config.tied:
        return unembed(final, params["embed"]["embedding"], dtype)
    return linear(final, params["head"]["kernel"], out_dtype=dtype)


def _attention_block(config: CausalLMConfig, params: PyTree, x: jax.Array, tables, attend) -> jax.Array:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if config.fused_qkv:
        fused = linear(x, params["qkv"]["kernel"], params["qkv"].get("bias"))
        ends = [heads * config.head_dim, (heads + kv_heads) * config.head_dim]
        query, key, value = jnp.split(fused, ends, axis=-1)
    else:
        query, key, value = (linear(x, params[name]["kernel"], params[name].get("bias")) for name in ("q", "k", "v"))
    query, key, value = (
        y.reshape(*y.shape[:-1], n, config.head_dim) for y, n in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    if tables is not None:
        query, key = apply_rope(query, tables), apply_rope(key, tables)
    mixed = attend(query, key, value)
    return linear(mixed.reshape(*x.shape[:-1], -1), params["out"]["kernel"], params["out"].get("bias"))


def _mlp(config: CausalLMConfig, params: PyTree, x: jax.Array) -> jax.Array:
    # Made again from its input in the backward pass: a GELU would else keep six arrays of the inner width.
    act = jax.checkpoint(ACTIVATIONS[config.activation], prevent_cse=False)
    inner = linear(x, params["up"]["kernel"], params["up"].get("bias"))
    if config.gated_mlp:
        inner = act(linear(x, params["gate"]["kernel"], params["gate"].get("bias"))) * inner
    else:
        inner = act(inner)
    return linear(inner, params["down"]["kernel"], params["down"].get("bias"))


def _norm(config: CausalLMConfig, params: PyTree, x: jax.Array) -> jax.Array:
    if config.norm == "rms":
        return rms_norm(x, params["scale"], config.norm_eps)
    return layer_norm(x, params["scale"], params["bias"], config.norm_eps)


def _mask(slots, positions, key_positions, window, valid, segments) -> jax.Array:
    return causal_mask(
        slots,
        positions,
        key_positions,
        window=window,
        key_valid=valid,
        query_segments=segments,
        key_segments=segments,
    )


def _positions(length: int, valid, segments, cache) -> jax.Array:
    """Counts tokens, ``[batch or 1, length]``, without padding: from the start of a segment, or on from the cache."""
    count = jnp.arange(length, dtype=jnp.int32)[None]
    if valid is not None:
        count = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    if segments is not None:
        first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        start = jax.lax.cummax(jnp.where(first, jnp.broadcast_to(count, first.shape), 0), axis=1)
        count = jnp.broadcast_to(count, start.shape) - start
    count = jnp.maximum(count, 0)
    if cache is None:
        return count
    return jnp.sum(cache.valid, axis=1, dtype=jnp.int32, keepdims=True) + jnp.broadcast_to(
        count, (cache.valid.shape[0], length)
    )


def _extend(cache: KVCache, positions: jax.Array, valid: jax.Array | None, batch: int) -> KVCache:
    """Enters the positions of new tokens; the layers enter their keys and values."""
    shape = (batch, positions.shape[1])
    start = (jnp.int32(0), cache.length)
    new = jnp.ones(shape, bool) if valid is None else valid
    return KVCache(
        keys=cache.keys,
        values=cache.values,
        positions=jax.lax.dynamic_update_slice(
            cache.positions, jnp.broadcast_to(positions.astype(jnp.int32), shape), start
        ),
        valid=jax.lax.dynamic_update_slice(cache.valid, new, start),
        length=cache.length + shape[1],
    )


def _check(config, tokens, valid, positions, segments, cache, remat) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected [batch, length], got shape {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens: expected integers, got {tokens.dtype}")
    if tokens.shape[1] > config.max_length:
        raise ValueError(f"tokens: {tokens.shape[1]} positions, the model has {config.max_length}")
    for name, value in (("attention_mask", valid), ("positions", positions), ("segment_ids", segments)):
        if value is not None and value.shape != tokens.shape:
            raise ValueError(f"{name}: expected the shape {tokens.shape} of tokens, got {value.shape}")
    if remat not in REMAT:
        raise ValueError(f"remat: expected one of {sorted(REMAT)}, got {remat!r}")
    if cache is None:
        return
    if segments is not None:
        raise ValueError("segment_ids: packed texts can't be read into a cache")
    if cache.positions.shape[0] != tokens.shape[0] or cache.slots < tokens.shape[1]:
        raise ValueError(
            f"cache: {cache.slots} slots for {cache.positions.shape[0]} sequences can't take tokens {tokens.shape}"
        )
