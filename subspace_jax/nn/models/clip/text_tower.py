"""The text towers of CLIP and SigLIP as pure functions."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from subspace_jax.nn.layers.embedding import check_tokens, embed, table_dtype
from subspace_jax.nn.layers.encoder import Encoder, check_size, encode, encoder_specs
from subspace_jax.nn.layers.linear import linear
from subspace_jax.nn.layers.norms import layer_norm
from subspace_jax.nn.layers.stacking import DEFAULT_OPTIONS, LayerOptions
from subspace_jax.nn.params import ParamSpec, dense_specs, norm_specs

PyTree = Any

POOLS = ("end", "largest", "last")


@dataclass(frozen=True)
class TextTowerConfig:
    """A text tower of pre-norm layers with learned positions.

    Attributes:
      vocab_size: Size of the vocabulary.
      max_length: Longest text, ``T``.
      width: Width of the residual stream, ``d``.
      num_layers: Number of layers.
      num_heads: Number of heads.
      mlp_size: Inner width of the perceptron.
      norm_eps: Epsilon of all norms.
      activation: Name of the activation function.
      causal: Whether attention is causal.
      pool: Position whose state is pooled: that of the first ``end_token`` ("end"), of the first largest token
        ("largest", the rule of CLIP's first checkpoints, whose end token is the largest), or the "last" one, padding
        included.
      end_token: Token that ends a text.
      head_size: Width of a dense layer after pooling; 0 for none.
    """

    vocab_size: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    mlp_size: int
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    causal: bool = True
    pool: str = "end"
    end_token: int = 49407
    head_size: int = 0

    def __post_init__(self):
        for name in ("vocab_size", "max_length"):
            check_size(name, getattr(self, name))
        if self.pool not in POOLS:
            raise ValueError(f"pool: expected one of {POOLS}, got {self.pool!r}")
        _ = self.encoder  # Checks the sizes of the layers.

    @property
    def encoder(self) -> Encoder:
        """The layers."""
        names = ("width", "num_layers", "num_heads", "mlp_size", "norm_eps", "activation", "causal")
        return Encoder(**{name: getattr(self, name) for name in names})

    def replace(self, **changes) -> "TextTowerConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class TextOutput(NamedTuple):
    """The output of a text tower.

    Attributes:
      pooled: Pooled states, ``[batch, head_size or d]``.
      tokens: States after the last norm, ``[batch, length, d]``.
      hidden: The captured hidden states in the order of depth; None where none was asked for.
    """

    pooled: jax.Array
    tokens: jax.Array
    hidden: tuple[jax.Array, ...] | None = None


def text_tower_specs(config: TextTowerConfig) -> PyTree:
    """Returns the specs of the parameters.

    ::

        embed/embedding     [V, d]
        position/embedding  [T, d]
        layers/...          [L, ...]      see encoder_specs
        norm/{scale, bias}  [d]
        head/{kernel, bias} [d, head_size]
    """
    d = config.width
    specs = {
        "embed": {"embedding": ParamSpec((config.vocab_size, d), ("vocab", "embed"), 0.02)},
        "position": {"embedding": ParamSpec((config.max_length, d), (None, "embed"), 0.01)},
        "layers": encoder_specs(config.encoder),
        "norm": norm_specs(d),
    }
    if config.head_size:
        specs["head"] = dense_specs(d, config.head_size, ("embed", None))
    return specs


def text_tower_apply(
    config: TextTowerConfig,
    params: PyTree,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    capture: Sequence[int] | str = (),
    dtype: DTypeLike | None = None,
    options: LayerOptions = DEFAULT_OPTIONS,
) -> TextOutput:
    """Runs a text tower.

    CLIP's padding follows the end token, so that with causal attention it does not affect the pooled state.  SigLIP
    was trained without a mask on texts padded to ``max_length`` with its end token; a mask changes its result.

    Args:
      config: The model.
      params: Parameters as laid out by :func:`text_tower_specs`.
      tokens: ``[batch, length]`` integers.  Where they are traced, a token outside the vocabulary and a text without
        end token give NaN; otherwise they raise.
      attention_mask: ``[batch, length]``, zero for padding.
      capture: Indices of the hidden states to return, or "all": 0 is the embeddings, ``l`` the output of layer ``l``,
        without the last norm; negative indices count from the end.
      dtype: Dtype of the activations, that of the embedding table by default.
      options: How the layers run.

    Returns:
      The output.

    Raises:
      ValueError: The texts are longer than ``max_length``, or shapes don't match; or, where tokens are not traced, one
        is outside the vocabulary or a text has no end token.
      TypeError: Tokens are not integers.
    """
    _check(config, tokens, attention_mask)
    dtype = table_dtype(params["embed"]["embedding"]) if dtype is None else jnp.dtype(dtype)
    x = embed(tokens, params["embed"]["embedding"], dtype)
    states, hidden = _states(config, params, x, attention_mask, capture, options)
    pooled = _head(config, params, _pool(config, states, tokens))
    return TextOutput(pooled=pooled, tokens=states, hidden=hidden or None)


def text_tower_from_embeddings(
    config: TextTowerConfig, params: PyTree, embeddings: jax.Array, ends: jax.Array
) -> jax.Array:
    """Runs a text tower on token embeddings, as prompt learning makes them.

    Args:
      config: The model.
      params: See :func:`text_tower_apply`; ``embed`` is not used.
      embeddings: ``[batch, length, d]``, floating point, without positions.
      ends: Position of each text's pooled state, ``[batch]`` integers.

    Returns:
      Pooled states ``[batch, head_size or d]``.

    Raises:
      ValueError: The texts are longer than ``max_length``, or shapes don't match.
    """
    if embeddings.ndim != 3 or embeddings.shape[2] != config.width or ends.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings, ends: expected [batch, length, {config.width}] and [batch], "
            f"got {embeddings.shape} and {ends.shape}"
        )
    if embeddings.shape[1] > config.max_length:
        raise ValueError(f"embeddings: {embeddings.shape[1]} positions, the tower has {config.max_length}")
    states, _ = _states(config, params, embeddings, None, (), DEFAULT_OPTIONS)
    return _head(config, params, _at(states, ends))


def _states(config, params, x, attention_mask, capture, options) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the states after the last norm, and the captured hidden ones, of embeddings without positions."""
    batch, length, _ = x.shape
    x = options.on_stream(x + params["position"]["embedding"][None, :length].astype(x.dtype))
    mask = None
    if attention_mask is not None:
        mask = jnp.broadcast_to(attention_mask.astype(bool)[:, None, None, :], (batch, 1, length, length))
        mask = mask & jnp.tri(length, dtype=bool)[None, None] if config.causal else mask
    x, hidden = encode(config.encoder, params["layers"], x, mask=mask, capture=capture, options=options)
    return layer_norm(x, params["norm"]["scale"], params["norm"]["bias"], config.norm_eps), hidden


def _head(config: TextTowerConfig, params: PyTree, pooled: jax.Array) -> jax.Array:
    return linear(pooled, params["head"]["kernel"], params["head"]["bias"]) if config.head_size else pooled


def _pool(config: TextTowerConfig, states: jax.Array, tokens: jax.Array) -> jax.Array:
    if config.pool == "last":
        return states[:, -1]
    if config.pool == "largest":
        return _at(states, jnp.argmax(tokens, axis=1))
    ends = tokens == config.end_token
    pooled = _at(states, jnp.argmax(ends, axis=1))
    return jnp.where(jnp.any(ends, axis=1)[:, None], pooled, jnp.full((), jnp.nan, pooled.dtype))


def _at(states: jax.Array, index: jax.Array) -> jax.Array:
    # A masked sum instead of a gather, which would all-gather a sharded batch.
    chosen = jax.nn.one_hot(index, states.shape[1], dtype=bool)[..., None]
    return jnp.sum(jnp.where(chosen, states, jnp.zeros((), states.dtype)), axis=1)


def _check(config: TextTowerConfig, tokens: jax.Array, mask: jax.Array | None) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens: expected [batch, length], got shape {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens: expected integers, got {tokens.dtype}")
    if tokens.shape[1] > config.max_length:
        raise ValueError(f"tokens: {tokens.shape[1]} positions, the tower has {config.max_length}")
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"attention_mask: expected the shape {tokens.shape} of tokens, got {mask.shape}")
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    values = np.asarray(tokens)
    check_tokens(values, config.vocab_size)
    if config.pool == "end" and not np.all(found := np.any(values == config.end_token, axis=1)):
        raise ValueError(f"tokens: text {int(np.argmin(found))} has no end token {config.end_token}")
