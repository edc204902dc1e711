"""Tables of word vectors: looking words up, and scoring words by them."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


@runtime_checkable
class StructuredTable(Protocol):
    """What must be offered to stand in the place of a table ``[vocab, d]``."""

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of ``tokens``, ``[..., d]`` in ``dtype``."""

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns the products of ``x`` ``[..., d]`` with all rows, ``[..., vocab]`` in the dtype of ``x``."""


def embed(tokens: jax.Array, table: jax.Array | StructuredTable, dtype: DTypeLike | None = None) -> jax.Array:
    """Looks up the rows of tokens.

    A table that is split over devices by its rows stays so: each device looks up the words that it holds, and the sum
    over devices has them all.

    Args:
      tokens: Integers ``[...]``.  A token outside the table gives NaN, for a wrong word would pass unseen.
      table: ``[vocab, d]``.
      dtype: Type of the result; that of the table by default.

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
    """Scores every word by its row: ``x @ table.T``.

    Args:
      x: ``[..., d]``, floating point.
      table: ``[vocab, d]``; rounded to the dtype of ``x``.
      out_dtype: Type of the result, that of ``x`` by default; the products are accumulated in it.

    Returns:
      ``[..., vocab]``.
    """
    if isinstance(table, StructuredTable):
        scores = table.scores(x)
        return scores if out_dtype is None else scores.astype(out_dtype)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, table.astype(x.dtype), contract, preferred_element_type=out_dtype)


def table_dtype(table: jax.Array | StructuredTable) -> jnp.dtype:
    """The dtype of a table, or of the first array of a structured one."""
    return jax.tree.leaves(table)[0].dtype


def check_tokens(tokens: ArrayLike, vocab_size: int) -> None:
    """Raises where a token lies outside the vocabulary; looks at values, hence not under ``jax.jit``.

    Args:
      tokens: Integers of any shape.
      vocab_size: Number of words.

    Raises:
      ValueError: A token is negative or at least ``vocab_size``; the message gives the first one and its place.
      TypeError: ``tokens`` are not integers.
    """
    values = np.asarray(tokens)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"tokens: expected integers, got {values.dtype}")
    outside = np.argwhere((values < 0) | (values >= vocab_size))
    if len(outside):
        place = tuple(int(i) for i in outside[0])
        raise ValueError(f"tokens: {values[place]} at {place} is outside the vocabulary of {vocab_size} words")
