"""Static embeddings of tokens, whose mean is the vector of a text."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
from jax.typing import DTypeLike

from subspace_jax.linalg import working_dtype
from subspace_jax.nn.layers.embedding import embed
from subspace_jax.nn.layers.encoder import check_size
from subspace_jax.nn.params import ParamSpec

PyTree = Any


@dataclass(frozen=True)
class StaticEmbeddingConfig:
    """A table of one vector for each token.

    Attributes:
      vocab_size: Size of the vocabulary, ``V``.
      width: Width of a vector, ``d``.
    """

    vocab_size: int
    width: int

    def __post_init__(self):
        for name in ("vocab_size", "width"):
            check_size(name, getattr(self, name))

    def replace(self, **changes) -> "StaticEmbeddingConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def static_embedding_specs(config: StaticEmbeddingConfig) -> PyTree:
    """Returns the spec of the table, ``embed/embedding`` ``[V, d]``."""
    return {"embed": {"embedding": ParamSpec((config.vocab_size, config.width), ("vocab", "embed"), 0.02)}}


def static_embedding_apply(
    config: StaticEmbeddingConfig, params: PyTree, tokens: jax.Array, *, dtype: DTypeLike | None = None
) -> jax.Array:
    """Looks up the vectors of tokens.

    Args:
      config: The model.
      params: Parameters as laid out by :func:`static_embedding_specs`.
      tokens: Integers ``[...]``.  A token outside the vocabulary gives NaN.
      dtype: Dtype of the vectors; that of the table, and at least float32, by default, as they are averaged.

    Returns:
      ``[..., d]``; :func:`mean_pool` makes one vector of those of a text.

    Raises:
      TypeError: ``tokens`` are not integers.
    """
    table = params["embed"]["embedding"]
    own = working_dtype(*jax.tree.leaves(table))
    return embed(tokens, table, own if dtype is None else dtype)
