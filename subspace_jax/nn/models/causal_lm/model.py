"""Causal language models as pure functions: one decoder for all families."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.layers.attention import causal_mask
from subspace_jax.nn.layers.embedding import embed, table_dtype, unembed
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.mlp import mlp
from subspace_jax.nn.layers.norms import layer_norm, rms_norm
from subspace_jax.nn.layers.rope import apply_rope, rope_tables
from subspace_jax.nn.layers.stacking import DEFAULT_OPTIONS, LayerOptions, run_layers
from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.kv_cache import KVCache

PyTree = Any


class CausalLMOutput(NamedTuple):
    """The output of a causal language model.

    Attributes:
      final: Residual stream after the last layer and the final norm, ``[batch, length, d]``.
      logits: Logits of the next token, ``[batch, length, vocab]``; None without ``with_logits``.
      hidden: ``[layers + 1, batch, length, d]``: the embeddings, then the output of each layer, ``final`` for the last;
        None without ``capture_hidden``.
      cache: The updated cache; None where none was given.
      stream: Residual stream after the last layer, before the final norm, ``[batch, length, d]``.
    """

    final: jax.Array
    logits: jax.Array | None = None
    hidden: jax.Array | None = None
    cache: KVCache | None = None
    stream: jax.Array | None = None


def causal_lm_apply(
    config: CausalLMConfig,
    params: PyTree,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    text_lengths: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    logits_dtype: DTypeLike | None = None,
    with_logits: bool = True,
    capture_hidden: bool = False,
    options: LayerOptions = DEFAULT_OPTIONS,
) -> CausalLMOutput:
    """Runs a causal language model.

    Works under ``jit``, ``grad`` and ``vmap``, with any kernel that :func:`subspace_jax.nn.linear` supports; the arrays
    of structured kernels in ``params["layers"]`` are stacked like all others.  Norms, rotary angles and softmax are
    computed in float32.  Mesh axes have to be of type Auto.

    Args:
      config: The model.
      params: Parameters as laid out by :func:`causal_lm_specs`, layers stacked or not (:func:`unstack_layers`).
      tokens: ``[batch, length]`` integers.  A token outside the vocabulary gives NaN; see :func:`check_tokens`.
      attention_mask: ``[batch, length]``, zero for padding, on either side.
      positions: ``[batch, length]`` integers; by default tokens other than padding are counted from 0 within their
        segment, or from the number of cached tokens.
      segment_ids: ``[batch, length]`` integers, of packed texts; tokens of different segments don't attend to each
        other.
      cache: Keys and values of previous tokens; the tokens take its next slots, which have to be free.
      text_lengths: ``[batch]`` integers, for rotary positions of kind "dynamic": lengths that the texts are going to
        have, which a cache remembers; by default those of the tokens given so far, of each segment by itself.  Tokens
        processed in parts have to be rotated alike.
      dtype: Dtype of the activations, that of the embedding table by default.
      logits_dtype: Dtype of the logits and of their accumulation, ``dtype`` by default.
      with_logits: Whether to compute logits; a loss may call :func:`causal_lm_logits` on parts of ``final`` instead.
      capture_hidden: Whether to return the hidden states.
      options: How the layers run.

    Returns:
      The output.

    Raises:
      ValueError: The sequence is longer than the model or the cache allows, shapes don't match, or segments are
        combined with a cache.
      TypeError: Tokens are not integers.
    """
    _check(config, tokens, attention_mask, positions, segment_ids, cache, text_lengths)
    batch, length = tokens.shape
    valid = None if attention_mask is None else attention_mask.astype(bool)
    # Plain causal attention needs no mask, whatever the positions are, unless a window counts them.
    plain = valid is None and segment_ids is None and cache is None and not config.windows_differ
    plain = plain and (positions is None or config.window is None)
    if positions is None:
        positions = _positions(length, valid, segment_ids, cache)
    dtype = table_dtype(params["embed"]["embedding"]) if dtype is None else dtype

    x = embeddings = options.on_stream(_embed(config, params, tokens, positions, dtype))

    slots, key_positions, key_valid = jnp.arange(length, dtype=jnp.int32), positions, valid
    if cache is not None:
        slots = cache.length + slots
        cache = _extend(cache, positions, valid, batch, text_lengths)
        key_positions, key_valid, text_lengths = cache.positions, cache.valid, cache.text_lengths
    lengths = _lengths(config, text_lengths, key_positions, key_valid, segment_ids)
    tables, local_tables = (
        None if rope is None else rope_tables(rope, config.head_dim, positions, lengths)
        for rope in (config.rope, config.local_rope)
    )

    def mask_of(window):
        segments = {"query_segments": segment_ids, "key_segments": segment_ids}
        return causal_mask(slots, positions, key_positions, window=window, key_valid=key_valid, **segments)

    mask = None if plain or config.windows_differ else mask_of(config.window)

    def block(carry, layer, own):
        x, cached = carry

        def attend(query, key, value):
            nonlocal cached
            if cached is not None:
                start = (own["index"], jnp.int32(0), cache.length - length, jnp.int32(0), jnp.int32(0))
                cached = tuple(_written(c, new, start) for c, new in zip(cached, (key, value), strict=True))
                key, value = (
                    jax.lax.dynamic_index_in_dim(c, own["index"], keepdims=False).astype(query.dtype) for c in cached
                )
            return options.attend_with(
                query / (own["index"] + 1).astype(query.dtype) if config.scale_by_layer else query,
                key,
                value,
                mask=mask_of(own["window"]) if config.windows_differ else mask,
                window=config.window,
                scale=score_scale(config),
                softcap=config.score_softcap,
            )

        own_tables = tables
        if local_tables is not None:
            own_tables = jax.tree.map(functools.partial(jnp.where, own["local"]), local_tables, tables)
        mixed = _attention_block(config, layer["attn"], apply_norm(config, layer["attn_norm"], x), own_tables, attend)
        x = x + _post_norm(config, layer, "attn_post_norm", mixed)
        inner = mlp(layer["mlp"], apply_norm(config, layer["mlp_norm"], x), config.activation)
        x = _edited(options, own["index"], options.on_stream(x + _post_norm(config, layer, "mlp_post_norm", inner)))
        return (x, cached), (x if capture_hidden else None)

    carry = (x, None if cache is None else (cache.keys, cache.values))
    (x, cached), after = run_layers(block, carry, params["layers"], layer_inputs(config), options)
    final = apply_norm(config, params["norm"], x)

    return CausalLMOutput(
        final=final,
        logits=causal_lm_logits(config, params, final, logits_dtype) if with_logits else None,
        hidden=jnp.concatenate([embeddings[None], after[:-1], final[None]]) if capture_hidden else None,
        cache=None if cache is None else dataclasses.replace(cache, keys=cached[0], values=cached[1]),
        stream=x,
    )


def causal_lm_logits(
    config: CausalLMConfig, params: PyTree, final: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    """Returns the logits of the next token, ``[..., vocab]``.

    Args:
      config: The model.
      params: Its parameters; the embedding table of a tied model is used, otherwise the head.
      final: ``final`` of the output, or a part of it, ``[..., d]``.
      dtype: Dtype of the logits, that of ``final`` by default.
    """
    if config.tied:
        logits = unembed(final, params["embed"]["embedding"], dtype)
    else:
        logits = linear(final, params["head"]["kernel"], out_dtype=dtype)
    cap = config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def layer_inputs(config: CausalLMConfig) -> dict[str, jax.Array]:
    """What differs between layers beside their parameters, ``[layers]`` each."""
    others = {"index": jnp.arange(config.num_layers, dtype=jnp.int32)}
    if config.windows_differ:
        everything = jnp.iinfo(jnp.int32).max
        others["window"] = jnp.array([w or everything for w in config.windows], jnp.int32)
    if config.local_rope is not None:
        others["local"] = jnp.array([w is not None for w in config.windows])
    return others


def _embed(config: CausalLMConfig, params: PyTree, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
    x = embed(tokens, params["embed"]["embedding"], dtype)
    if config.scale_embeddings:
        x = x * jnp.asarray(math.sqrt(config.hidden_size), dtype)
    if config.rope is None:
        x = x + jnp.broadcast_to(embed(positions, params["position"]["embedding"], dtype), x.shape)
    return x


def _attention_block(config: CausalLMConfig, params: PyTree, x: jax.Array, tables, attend) -> jax.Array:
    mixed = attend(*attention_heads(config, params, x, tables))
    return linear(mixed.reshape(*x.shape[:-1], -1), params["out"]["kernel"], params["out"].get("bias"))


def attention_heads(config: CausalLMConfig, params: PyTree, x: jax.Array, tables) -> tuple[jax.Array, ...]:
    """Returns queries, keys and values of a layer, ``[..., heads or kv_heads, head_dim]``.

    Args:
      config: The model.
      params: ``attn`` of a layer.
      x: Normalized input of the layer, ``[batch, length, d]``.
      tables: Those of :func:`rope_tables`; None leaves queries and keys as they are.
    """

    def project(name: str) -> jax.Array:
        return linear(x, params[name]["kernel"], params[name].get("bias"))

    heads, kv_heads = config.num_heads, config.num_kv_heads
    if config.fused_qkv:
        ends = [heads * config.head_dim, (heads + kv_heads) * config.head_dim]
        parts = jnp.split(project("qkv"), ends, axis=-1)
    else:
        parts = [project(name) for name in ("q", "k", "v")]
    query, key, value = (
        y.reshape(*y.shape[:-1], n, config.head_dim) for y, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)
    )
    if config.qk_norm:
        query, key = apply_norm(config, params["q_norm"], query), apply_norm(config, params["k_norm"], key)
    if tables is not None:
        query, key = apply_rope(query, tables), apply_rope(key, tables)
    return query, key, value


def apply_norm(config: CausalLMConfig, params: PyTree, x: jax.Array) -> jax.Array:
    """Returns ``x [..., d]`` normalized as the model does."""
    if config.norm != "layer":
        return rms_norm(x, params["scale"], config.norm_eps, offset=config.norm == "rms_offset")
    return layer_norm(x, params["scale"], params["bias"], config.norm_eps)


def _edited(options: LayerOptions, index: jax.Array, x: jax.Array) -> jax.Array:
    if options.edit is None:
        return x
    layer, change = options.edit
    return jax.lax.cond(index == layer, change, lambda x: x, x)


def _post_norm(config: CausalLMConfig, layer: PyTree, name: str, x: jax.Array) -> jax.Array:
    return apply_norm(config, layer[name], x) if config.post_norms else x


def score_scale(config: CausalLMConfig) -> float | None:
    """Returns the factor of the scores; None for ``1 / sqrt(head_dim)``."""
    if not config.scale_scores:
        return 1.0
    return None if config.score_dim is None else 1 / math.sqrt(config.score_dim)


def _written(cached: jax.Array, new: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(cached, new[None].astype(cached.dtype), start)


def _positions(length: int, valid, segments, cache) -> jax.Array:
    """Counts tokens other than padding, ``[batch or 1, length]``, within their segment or after the cached ones."""
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


def _lengths(config: CausalLMConfig, given, positions: jax.Array, valid, segments) -> jax.Array | None:
    """Length of the text of each token, ``[batch or 1, length or 1]``, where rotary positions depend on it."""
    if given is not None:
        return given[:, None]
    if not any(rope is not None and rope.kind == "dynamic" for rope in (config.rope, config.local_rope)):
        return None
    if segments is None:
        last = positions if valid is None else jnp.where(valid, positions, 0)
        return jnp.max(last, axis=1, keepdims=True) + 1
    count = segments.shape[1]
    ends = jnp.concatenate([segments[:, 1:] != segments[:, :-1], jnp.ones_like(segments[:, :1], bool)], axis=1)
    slots = jnp.where(ends, jnp.arange(count, dtype=jnp.int32)[None], count)
    return jnp.take_along_axis(positions, jax.lax.cummin(slots, axis=1, reverse=True), axis=1) + 1


def _extend(cache: KVCache, positions: jax.Array, valid, batch: int, text_lengths) -> KVCache:
    """Adds the positions of new tokens; the layers add keys and values."""
    shape = (batch, positions.shape[1])
    start = (jnp.int32(0), cache.length)
    new = jnp.ones(shape, bool) if valid is None else valid
    return dataclasses.replace(
        cache,
        positions=jax.lax.dynamic_update_slice(
            cache.positions, jnp.broadcast_to(positions.astype(jnp.int32), shape), start
        ),
        valid=jax.lax.dynamic_update_slice(cache.valid, new, start),
        length=cache.length + shape[1],
        text_lengths=cache.text_lengths if text_lengths is None else text_lengths,
    )


def _check(config, tokens, valid, positions, segments, cache, text_lengths) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected [batch, length], got shape {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens: expected integers, got {tokens.dtype}")
    if tokens.shape[1] > config.max_length:
        raise ValueError(f"tokens: {tokens.shape[1]} positions, the model has {config.max_length}")
    for name, value in (("attention_mask", valid), ("positions", positions), ("segment_ids", segments)):
        if value is not None and value.shape != tokens.shape:
            raise ValueError(f"{name}: expected the shape {tokens.shape} of tokens, got {value.shape}")
    if text_lengths is not None and text_lengths.shape != tokens.shape[:1]:
        raise ValueError(f"text_lengths: expected shape {tokens.shape[:1]}, got {text_lengths.shape}")
    if cache is None:
        return
    if segments is not None:
        raise ValueError("segment_ids: a cache does not support packed texts")
    if cache.positions.shape[0] != tokens.shape[0] or cache.slots < tokens.shape[1]:
        raise ValueError(
            f"cache: {cache.slots} slots for {cache.positions.shape[0]} sequences can't take tokens {tokens.shape}"
        )
