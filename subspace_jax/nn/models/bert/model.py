"""BERT as a pure function."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from subspace_jax.nn.layers.embedding import check_tokens, embed, table_dtype
from subspace_jax.nn.layers.encoder import encode, encoder_specs
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.norms import layer_norm
from subspace_jax.nn.layers.stacking import DEFAULT_OPTIONS, LayerOptions
from subspace_jax.nn.models.bert.config import BertConfig
from subspace_jax.nn.params import ParamSpec, dense_specs, norm_specs

PyTree = Any


class BertOutput(NamedTuple):
    """The output of BERT.

    Attributes:
      tokens: States after the last layer, ``[batch, length, d]``; :func:`mean_pool` makes one vector of them.
      pooled: Output of the pooler, ``[batch, d]``; None where the model has none.
      hidden: The captured hidden states in the order of depth; None where none was asked for.
    """

    tokens: jax.Array
    pooled: jax.Array | None = None
    hidden: tuple[jax.Array, ...] | None = None


def bert_specs(config: BertConfig) -> PyTree:
    """Returns the specs of the parameters.

    ::

        embed/embedding          [V, d]
        position/embedding       [T, d]
        token_type/embedding     [types, d]
        norm/{scale, bias}       [d]        of the embeddings
        layers/...               [L, ...]   see encoder_specs; attn_norm and mlp_norm follow the sums
        pooler/{kernel, bias}    [d, d]     with pooler

    Args:
      config: The model.
    """
    d = config.width
    specs = {
        "embed": {"embedding": ParamSpec((config.vocab_size, d), ("vocab", "embed"), 0.02)},
        "position": {"embedding": ParamSpec((config.max_length, d), (None, "embed"), 0.02)},
        "token_type": {"embedding": ParamSpec((config.num_types, d), (None, "embed"), 0.02)},
        "norm": norm_specs(d),
        "layers": encoder_specs(config.encoder),
    }
    if config.pooler:
        specs["pooler"] = dense_specs(d, d, ("embed", None))
    return specs


def bert_apply(
    config: BertConfig,
    params: PyTree,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    token_types: jax.Array | None = None,
    capture: Sequence[int] | str = (),
    dtype: DTypeLike | None = None,
    options: LayerOptions = DEFAULT_OPTIONS,
) -> BertOutput:
    """Runs BERT, without dropout.

    Args:
      config: The model.
      params: Parameters as laid out by :func:`bert_specs`.
      tokens: ``[batch, length]`` integers, with the tokens that begin and end a text.  Where they are traced, a token
        outside the vocabulary gives NaN; otherwise it raises.
      attention_mask: ``[batch, length]``, zero for padding.
      token_types: ``[batch, length]`` integers; zeros by default.
      capture: Indices of the hidden states to return, or "all": 0 is the normalized embeddings, ``l`` the output of
        layer ``l``; negative indices count from the end.
      dtype: Dtype of the activations, that of the embedding table by default.
      options: How the layers run.

    Returns:
      The output.

    Raises:
      ValueError: The texts are longer than ``max_length``, shapes don't match, or, where tokens are not traced, one is
        outside the vocabulary.
      TypeError: Tokens are not integers.

    Examples:
      >>> import jax
      >>> from subspace_jax import nn
      >>> config = nn.BertConfig(vocab_size=50, max_length=16, width=8, num_layers=2, num_heads=2, mlp_size=16)
      >>> params = nn.init_params(jax.random.key(0), config)
      >>> tokens, mask = jax.numpy.array([[1, 7, 2], [1, 2, 0]]), jax.numpy.array([[1, 1, 1], [1, 1, 0]])
      >>> states = nn.bert_apply(config, params, tokens, attention_mask=mask).tokens
      >>> nn.normalize(nn.mean_pool(states, mask)).shape
      (2, 8)
    """
    _check(config, tokens, attention_mask, token_types)
    batch, length = tokens.shape
    dtype = table_dtype(params["embed"]["embedding"]) if dtype is None else jnp.dtype(dtype)
    types = params["token_type"]["embedding"].astype(dtype)
    x = embed(tokens, params["embed"]["embedding"], dtype)
    x = x + (types[None, :1] if token_types is None else embed(token_types, types))
    x = x + params["position"]["embedding"][None, :length].astype(dtype)
    x = options.on_stream(layer_norm(x, params["norm"]["scale"], params["norm"]["bias"], config.norm_eps))
    mask = None
    if attention_mask is not None:
        mask = jnp.broadcast_to(attention_mask.astype(bool)[:, None, None, :], (batch, 1, length, length))
    x, hidden = encode(config.encoder, params["layers"], x, mask=mask, capture=capture, options=options)
    pooled = None
    if config.pooler:
        pooled = jnp.tanh(linear(x[:, 0], params["pooler"]["kernel"], params["pooler"]["bias"]))
    return BertOutput(tokens=x, pooled=pooled, hidden=hidden or None)


def _check(config: BertConfig, tokens: jax.Array, mask: jax.Array | None, types: jax.Array | None) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected [batch, length], got shape {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens: expected integers, got {tokens.dtype}")
    if tokens.shape[1] > config.max_length:
        raise ValueError(f"tokens: {tokens.shape[1]} positions, the model has {config.max_length}")
    for name, other in (("attention_mask", mask), ("token_types", types)):
        if other is not None and other.shape != tokens.shape:
            raise ValueError(f"{name}: expected the shape {tokens.shape} of tokens, got {other.shape}")
    if not isinstance(tokens, jax.core.Tracer) and getattr(tokens, "is_fully_addressable", True):
        check_tokens(np.asarray(tokens), config.vocab_size)
