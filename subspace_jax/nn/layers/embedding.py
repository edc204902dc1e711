"""Embedding tables: lookup of tokens, and logits from the same table."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


@runtime_checkable
class StructuredTable(Protocol):
    """The protocol of weights that replace an embedding table ``[vocab, d]``."""

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the embeddings of ``tokens``, ``[..., d]`` in ``dtype``."""

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ table.T`` for ``x`` ``[..., d]``, as ``[..., vocab]`` in the dtype of ``x``."""


def embed(tokens: jax.Array, table: jax.Array | StructuredTable, dtype: DTypeLike | None = None) -> jax.Array:
    """Looks up the embeddings of tokens.

    A table sharded over the vocabulary is not gathered: each device looks up the tokens that it holds, and the results
    are summed over devices.

    Args:
      tokens: Integers ``[...]``.  A token outside the vocabulary gives NaN.
      table: ``[vocab, d]``.
      dtype: Dtype of the result; that of the table by default.

    Returns:
      ``[..., d]``.

    Raises:
      TypeError: ``tokens`` are not integers.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens: expected integers, got {tokens.dtype}")
    if isinstance(table, StructuredTable):
        return table.lookup(tokens, table_dtype(table) if dtype is None else dtype)
    rows = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows if dtype is None else rows.astype(dtype)


def unembed(x: jax.Array, table: jax.Array | StructuredTable, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Returns the logits of all tokens, ``x @ table.T``.

    Args:
      x: ``[..., d]``, floating point.
      table: ``[vocab, d]``; cast to the dtype of ``x``.
      out_dtype: Dtype of the result and of the accumulation, that of ``x`` by default.

    Returns:
      ``[..., vocab]``.
    """
    if isinstance(table, StructuredTable):
        scores = table.scores(x)
        return scores if out_dtype is None else scores.astype(out_dtype)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, table.astype(x.dtype), contract, preferred_element_type=out_dtype)


def table_dtype(table: jax.Array | StructuredTable) -> jnp.dtype:
    """Returns the dtype of a table, or of the first array of a structured one."""
    return jax.tree.leaves(table)[0].dtype


def check_tokens(tokens: ArrayLike, vocab_size: int) -> None:
    """Checks that tokens are in the vocabulary; reads values, so it does not work under ``jax.jit``.

    Args:
      tokens: Integers of any shape.
      vocab_size: Size of the vocabulary.

    Raises:
      ValueError: A token is negative or at least ``vocab_size``; the message gives the first one and its index.
      TypeError: ``tokens`` are not integers.
    """
    values = np.asarray(tokens)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"tokens: expected integers, got {values.dtype}")
    outside = np.argwhere((values < 0) | (values >= vocab_size))
    if len(outside):
        index = tuple(int(i) for i in outside[0])
        raise ValueError(f"tokens: {values[index]} at {index} is outside the vocabulary of {vocab_size} tokens")
