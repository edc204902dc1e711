"""Generation with a cache of keys and values, greedy or by nucleus sampling."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from subspace_jax.nn.layers.embedding import table_dtype
from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.kv_cache import KVCache, init_cache
from subspace_jax.nn.models.causal_lm.model import causal_lm_apply, causal_lm_logits

PyTree = Any


class Generated(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: ``[batch, max_new_tokens]`` int32, padded after an end token.
      lengths: ``[batch]`` int32, number of new tokens, the end token included.
    """

    tokens: jax.Array
    lengths: jax.Array


class Options(NamedTuple):
    """The options of :func:`generate`."""

    max_new_tokens: int
    attention_mask: jax.Array | None = None
    key: jax.Array | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    eos_tokens: int | Sequence[int] | None = None
    pad_token: int | None = None
    dtype: DTypeLike | None = None


class Decoding(NamedTuple):
    """The static options of a compiled program."""

    max_new_tokens: int
    sampled: bool
    nucleus: bool
    eos: tuple[int, ...]
    pad: int
    dtype: Any


class State(NamedTuple):
    """What a step of generation takes and returns: new tokens so far, ``[batch]`` bool and int32, and the cache."""

    step: jax.Array
    done: jax.Array
    token: jax.Array
    cache: KVCache


def generate(
    config: CausalLMConfig,
    params: PyTree,
    tokens: jax.Array,
    *,
    max_new_tokens: int,
    attention_mask: jax.Array | None = None,
    key: jax.Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_tokens: int | Sequence[int] | None = None,
    pad_token: int | None = None,
    dtype: DTypeLike | None = None,
) -> Generated:
    """Continues prompts with a cache of keys and values, until every text has ended.

    Args:
      config: The model.
      params: Its parameters; kernels may be structured.
      tokens: Prompts ``[batch, length]``, padded on either side.
      max_new_tokens: Largest number of new tokens.
      attention_mask: ``[batch, length]``, zero for padding; at least one token in each prompt.
      key: Random key; needed where ``temperature > 0``.
      temperature: Divisor of the logits in sampling; 0 for greedy decoding.
      top_p: Probability of the nucleus that tokens are sampled from (arXiv 1904.09751).
      eos_tokens: Token or tokens that end a text; those of the config by default.
      pad_token: Token after the end; the config's by default, or 0.
      dtype: Dtype of activations and cache, that of the embedding table by default.

    Returns:
      The new tokens, without the prompts.

    Raises:
      ValueError: Prompt and new tokens exceed ``config.max_length``, or an option is out of range or missing.
    """
    options = Options(max_new_tokens, attention_mask, key, temperature, top_p, eos_tokens, pad_token, dtype)
    decoding, valid, sampling = prepare(config, params, tokens, options)
    return _generate(config, decoding, params, tokens.astype(jnp.int32), valid, sampling)


def prepare(
    config: CausalLMConfig, params: PyTree, tokens: jax.Array, options: Options
) -> tuple[Decoding, jax.Array, tuple[jax.Array, ...]]:
    """Checks options; returns the static ones, the mask as bool, and the arrays of sampling."""
    max_new_tokens, attention_mask, key, temperature, top_p, eos_tokens, pad_token, dtype = options
    _check(config, tokens, max_new_tokens, key, temperature, top_p)
    eos = config.eos_tokens if eos_tokens is None else eos_tokens
    eos = (eos,) if isinstance(eos, int | np.integer) else tuple(eos)
    if eos_tokens is not None and not all(0 <= token < config.vocab_size for token in eos):
        raise ValueError(f"eos_tokens: expected tokens below vocab_size {config.vocab_size}, got {eos_tokens}")
    if attention_mask is None:
        attention_mask = jnp.ones(tokens.shape, bool)
    decoding = Decoding(
        max_new_tokens=max_new_tokens,
        sampled=temperature > 0,
        nucleus=top_p < 1,
        eos=tuple(int(token) for token in eos),
        pad=pad_token if pad_token is not None else config.pad_token or 0,
        dtype=jnp.dtype(table_dtype(params["embed"]["embedding"]) if dtype is None else dtype),
    )
    sampling = (jax.random.key(0) if key is None else key, jnp.float32(temperature), jnp.float32(top_p))
    return decoding, attention_mask.astype(bool), sampling


def _check(config, tokens, max_new_tokens, key, temperature, top_p) -> None:
    if not jnp.issubdtype(getattr(tokens, "dtype", type(tokens)), jnp.integer):
        raise TypeError(f"tokens: expected an array of integers, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens: expected prompts [batch, length >= 1], got shape {tokens.shape}")
    if not isinstance(max_new_tokens, int | np.integer):
        raise ValueError(f"max_new_tokens: expected an integer, got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if tokens.shape[1] >= config.max_length:
        raise ValueError(
            f"tokens: a prompt of {tokens.shape[1]} leaves none of the model's {config.max_length} positions"
        )
    if tokens.shape[1] + max_new_tokens > config.max_length:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {tokens.shape[1]} exceed the model's "
            f"{config.max_length} positions"
        )
    if temperature != 0 and not 1e-6 <= temperature < math.inf:  # below, scores would overflow
        raise ValueError(f"expected temperature >= 0, finite and not between 0 and 1e-6, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"expected 0 < top_p <= 1, got {top_p}")
    if temperature > 0 and key is None:
        raise ValueError(f"key: sampling at temperature {temperature} needs a random key, got None")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(config, decoding, params, tokens, valid, sampling):
    state = read_prompt(config, decoding, params, tokens, valid, sampling)
    shape = (tokens.shape[0], decoding.max_new_tokens)
    new = jnp.full(shape, decoding.pad, jnp.int32).at[:, 0].set(state.token)

    def more(carry):
        _, state = carry
        return (state.step < decoding.max_new_tokens) & ~jnp.all(state.done)

    def one(carry):
        new, state = carry
        after = next_token(config, decoding, params, sampling, state)
        return jax.lax.dynamic_update_slice(new, after.token[:, None], (jnp.int32(0), state.step)), after

    new, _ = jax.lax.while_loop(more, one, (new, state))
    ended = ends(decoding, new)
    lengths = jnp.where(jnp.any(ended, axis=1), jnp.argmax(ended, axis=1) + 1, decoding.max_new_tokens)
    return Generated(new, lengths.astype(jnp.int32))


def read_prompt(config, decoding, params, tokens, valid, sampling) -> State:
    """Returns the state after the first new token of each prompt."""
    batch, length = tokens.shape
    # Without a slot for the last new token, whose key is never used.
    cache = init_cache(config, batch, length + decoding.max_new_tokens - 1, decoding.dtype)
    # Known beforehand, so that all tokens of a text are rotated alike.
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32) + decoding.max_new_tokens
    read = causal_lm_apply(
        config,
        params,
        tokens,
        attention_mask=valid,
        cache=cache,
        text_lengths=lengths,
        dtype=decoding.dtype,
        with_logits=False,
    )
    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    final = jnp.take_along_axis(read.final, last[:, None, None], axis=1)
    first = _choose(config, decoding, params, final, sampling, 0)
    return State(jnp.int32(1), ends(decoding, first), first, read.cache)


def next_token(config, decoding, params, sampling, state: State) -> State:
    """Returns the state after one more token of each text, padding where it has ended."""
    step, done, token, cache = state
    out = causal_lm_apply(config, params, token[:, None], cache=cache, dtype=decoding.dtype, with_logits=False)
    token = jnp.where(done, decoding.pad, _choose(config, decoding, params, out.final, sampling, step))
    return State(step + 1, done | ends(decoding, token), token, out.cache)


def ends(decoding: Decoding, token: jax.Array) -> jax.Array:
    """Whether tokens end a text."""
    eos = jnp.array(decoding.eos, jnp.int32)
    return jnp.isin(token, eos) if decoding.eos else jnp.zeros(token.shape, bool)


def _choose(config, decoding, params, final, sampling, step):
    logits = causal_lm_logits(config, params, final, jnp.float32)[:, 0].astype(jnp.float32)
    if not decoding.sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key, temperature, top_p = sampling
    logits = logits / temperature
    if decoding.nucleus:
        logits = keep_top_p(logits, top_p)
    return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)


def keep_top_p(logits: jax.Array, top_p: jax.typing.ArrayLike) -> jax.Array:
    """Sets logits outside the nucleus of probability ``top_p`` to ``-inf`` (arXiv 1904.09751).

    Args:
      logits: ``[..., vocab]`` float32.
      top_p: Probability of the nucleus, in ``(0, 1]``; the likeliest token always stays, as do ties of the last one.

    Returns:
      ``[..., vocab]``.
    """
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
