"""The text towers of CLIP and SigLIP as pure functions: one vector for a text."""

import dataclasses
from collections.abc import Callable, Sequence
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
from subspace_jax.nn.params import ParamSpec, dense_specs, draw_params, norm_specs, spec_axes, spec_shapes

PyTree = Any

POOLS = ("end", "largest", "last")


@dataclass(frozen=True)
class TextTowerConfig:
    """A text tower of pre-norm blocks with learned positions.

    Attributes:
      vocab_size: Words.
      max_length: Longest text, ``T``.
      width: Width of the residual stream, ``d``.
      num_layers: Blocks.
      num_heads: Heads.
      mlp_size: Width inside the perceptron.
      norm_eps: Epsilon of all norms.
      activation: See :class:`subspace_jax.nn.encoder.Encoder`.
      causal: Whether a word sees itself and earlier ones only.
      pool: Which word's state is the text's: that of the first ``end_token`` ("end"), of the first largest token
        ("largest", the rule of CLIP's first checkpoints, whose end token is the largest), or of the "last" token,
        padding or not.
      end_token: Token that ends a text.
      head_size: Width of a further map behind the pooled state; 0 for none.
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
        _ = self.encoder  # Checks the sizes of the blocks.

    @property
    def encoder(self) -> Encoder:
        """The blocks."""
        names = ("width", "num_layers", "num_heads", "mlp_size", "norm_eps", "activation")
        return Encoder(**{name: getattr(self, name) for name in names})

    def replace(self, **changes) -> "TextTowerConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class TextOutput(NamedTuple):
    """What a text tower returns.

    Attributes:
      pooled: One vector for each text, ``[batch, head_size or d]``.
      tokens: States of the words behind the last norm, ``[batch, length, d]``.
      hidden: The captured hidden states in the order of depth; None where none was asked for.
    """

    pooled: jax.Array
    tokens: jax.Array
    hidden: tuple[jax.Array, ...] | None = None


def text_tower_specs(config: TextTowerConfig) -> PyTree:
    """Describes every parameter: a nested dict of :class:`ParamSpec` with the layout of the parameters.

    ::

        embed/embedding     [V, d]
        position/embedding  [T, d]
        layers/...          [L, ...]      as encoder_specs has them
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


def text_tower_axes(config: TextTowerConfig) -> PyTree:
    """Returns the logical axis names of every parameter, a tree of ``PartitionSpec``."""
    return spec_axes(text_tower_specs(config))


def text_tower_shapes(config: TextTowerConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns every parameter as a ``ShapeDtypeStruct``."""
    return spec_shapes(text_tower_specs(config), dtype)


def text_tower_init(key: jax.Array, config: TextTowerConfig, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Draws fresh parameters, as :func:`text_tower_specs` lays them out."""
    return draw_params(key, text_tower_specs(config), dtype)


def text_tower_apply(
    config: TextTowerConfig,
    params: PyTree,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    capture: Sequence[int] | str = (),
    dtype: DTypeLike | None = None,
    remat: str = "none",
    on_layer: Callable[[PyTree], PyTree] | None = None,
    on_stream: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
    unroll: int = 1,
) -> TextOutput:
    """Reads a batch of texts.

    CLIP's padding comes behind the end token and, the tower being causal, can't change the pooled vector.  SigLIP was
    trained on texts that are padded to exactly ``max_length`` with its end token, and without a mask; a mask hides
    padding and so changes the result.

    Args:
      config: The tower.
      params: Nested dict, as :func:`text_tower_specs` lays it out.
      tokens: ``[batch, length]`` integers.  Where they are traced, a token outside the vocabulary and a text without
        end token give NaN; otherwise they raise.
      attention_mask: ``[batch, length]``, nonzero for tokens that may be seen.
      capture: Entries of the list of ``layers + 1`` hidden states that are wanted: 0 is the embeddings, ``l`` what
        block ``l`` leaves, without the last norm; negative ones count from the end.  "all" for all.
      dtype: Type of the activations, that of the embedding by default.
      remat: See :func:`vision_transformer_apply`, as all that follow.
      on_layer: Applied to the parameters of one block.
      on_stream: Applied to the stream after the embedding and after every block.
      implementation: Of attention.
      unroll: Blocks in a step of the loop.

    Returns:
      The output.

    Raises:
      ValueError: The texts are longer than the tower has positions, shapes don't match, or a token is outside the
        vocabulary or a text without end token and neither is traced.
      TypeError: Tokens are not integers.
    """
    _check(config, tokens, attention_mask)
    batch, length = tokens.shape
    dtype = table_dtype(params["embed"]["embedding"]) if dtype is None else jnp.dtype(dtype)
    on_stream = on_stream or (lambda x: x)
    x = embed(tokens, params["embed"]["embedding"], dtype)
    x = on_stream(x + params["position"]["embedding"][None, :length].astype(dtype))
    mask = None
    if attention_mask is not None:
        sees = jnp.broadcast_to(attention_mask.astype(bool)[:, None, None, :], (batch, 1, length, length))
        mask = sees & jnp.tri(length, dtype=bool)[None, None] if config.causal else sees
    x, hidden = encode(
        config.encoder,
        params["layers"],
        x,
        mask=mask,
        causal=config.causal,
        capture=range(config.num_layers + 1) if capture == "all" else capture,
        remat=remat,
        on_layer=on_layer,
        on_stream=on_stream,
        implementation=implementation,
        unroll=unroll,
    )
    states = layer_norm(x, params["norm"]["scale"], params["norm"]["bias"], config.norm_eps)
    pooled = _pool(config, states, tokens)
    if config.head_size:
        pooled = linear(pooled, params["head"]["kernel"], params["head"]["bias"])
    return TextOutput(pooled=pooled, tokens=states, hidden=hidden if len(hidden) else None)


def _pool(config: TextTowerConfig, states: jax.Array, tokens: jax.Array) -> jax.Array:
    if config.pool == "last":
        return states[:, -1]
    if config.pool == "largest":
        return _at(states, jnp.argmax(tokens, axis=1))
    ends = tokens == config.end_token
    pooled = _at(states, jnp.argmax(ends, axis=1))
    return jnp.where(jnp.any(ends, axis=1)[:, None], pooled, jnp.full((), jnp.nan, pooled.dtype))


def _at(states: jax.Array, index: jax.Array) -> jax.Array:
    # A sum over one of many rather than a gather, which would bring a split batch together.
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
