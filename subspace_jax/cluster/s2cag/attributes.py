"""Weights of attributes, and their normalization."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg


def tfidf(counts: jax.Array) -> jax.Array:
    """Smooth tf-idf weights of counts, with rows of unit length.

    Column ``j`` is multiplied by ``ln((1 + n) / (1 + df_j)) + 1`` with ``df_j`` the rows in which it is not 0.  Give it
    counts: what was normalized before has lost them.

    Args:
      counts: ``[n, d]``, floating point, no entry negative.

    Returns:
      ``[n, d]``, float32 or wider; a row of zeros stays zero.

    Raises:
      ValueError: ``counts`` is no matrix, or (where its values are known) has a negative entry or one not finite.
      TypeError: ``counts`` is not floating point.
    """
    counts = _checked("counts", counts)
    if linalg.is_here(counts) and bool(jnp.any(counts < 0)):
        raise ValueError("counts: expected no negative entry; attributes that are no counts need no tf-idf")
    n = counts.shape[0]
    documents = jnp.sum(counts > 0, axis=0).astype(counts.dtype)
    return linalg.unit_vectors(counts * (jnp.log((1 + n) / (1 + documents)) + 1)[None])


def normalize_attributes(f: jax.Array) -> jax.Array:
    """Divides rows by the roots of the sums of their inner products with all rows.

    The inner products of the result are then the similarities ``F F^T`` normalized on both sides, whose largest
    eigenvalue is 1.

    Args:
      f: ``[n, d]``, floating point.

    Returns:
      ``X [n, d]``, float32 or wider; a row of zeros stays zero.

    Raises:
      ValueError: ``f`` is no matrix, or (where its values are known) not finite, or the inner products of a row with
        all rows have a negative sum.
      TypeError: ``f`` is not floating point.
    """
    f = _checked("f", f)
    sums = linalg.times(f, jnp.sum(f, axis=0)[:, None])[:, 0]
    if linalg.is_here(sums) and bool(jnp.any(sums < 0)):
        row = int(np.argmin(sums))
        raise ValueError(
            f"f: expected rows whose inner products with all rows add up to no less than 0, got {sums[row]:.3g} of row "
            f"{row}; subtract the least entry of each column, or take counts"
        )
    return f / jnp.sqrt(jnp.where(sums == 0, 1, sums))[:, None]


def _checked(name: str, x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: expected attributes [n, d], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, got {x.dtype}")
    linalg.check_finite(name, x)
    return x.astype(linalg.working_dtype(x))
