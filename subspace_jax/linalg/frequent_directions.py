"""Frequent Directions: a sketch of a stream of columns with an error bound."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from subspace_jax.linalg._checks import check_matrix
from subspace_jax.linalg.products import times
from subspace_jax.linalg.stacks import of_each
from subspace_jax.linalg.svd import canonical_signs, canonical_svd

SVD_METHODS = ("svd", "gram_eigh")


class FDState(NamedTuple):
    """A sketch ``S = basis diag(sigma)``.

    Attributes:
      sketch: ``[..., m, rank]``.
      sigma: ``[..., rank]``, descending.
      basis: ``[..., m, rank]``, orthonormal columns after the first update.
    """

    sketch: jax.Array
    sigma: jax.Array
    basis: jax.Array


def frequent_directions_init(
    m: int, rank: int, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> FDState:
    """Returns an empty sketch of columns of length ``m``.

    Args:
      m: Length of columns.
      rank: Columns of the sketch, below ``m``.
      batch_shape: Leading axes.
      dtype: float32 or float64.

    Returns:
      The sketch, all zeros.

    Raises:
      ValueError: ``rank`` is not between 1 and ``m - 1``.
    """
    if not 1 <= rank < m:
        raise ValueError(f"rank: expected 1 to {m - 1} for columns of length {m}, got {rank}")
    zeros = jnp.zeros((*batch_shape, m, rank), dtype)
    return FDState(zeros, jnp.zeros((*batch_shape, rank), dtype), zeros)


def frequent_directions_update(
    state: FDState, columns: jax.Array, *, decay: ArrayLike = 1.0, method: str = "svd"
) -> FDState:
    """Adds columns to a sketch, and subtracts the square of the first dropped singular value from all squares.

    With ``decay`` 1, ``sum G G^T - S S^T`` is positive semidefinite, and its norm is at most the sum of the subtracted
    squares (Ghashami, Liberty, Phillips, Woodruff, arXiv 1501.01711); columns of joint rank up to that of the sketch
    are represented exactly.

    Args:
      state: The sketch so far, of ``rank`` columns.
      columns: ``[..., m, n]`` with ``min(m, n) > rank``, float32 or float64.
      decay: Factor on the old sketch.
      method: "svd", or "gram_eigh": eigenvectors of ``m x m`` Gram matrices, faster, but inaccurate for singular values
        below the square root of the machine precision, relative to the largest.

    Returns:
      The new sketch.

    Raises:
      ValueError: Shapes do not match, or the method is unknown.
      TypeError: ``columns`` is neither float32 nor float64.
    """
    u, s = left_singular(columns, method)
    return merge_directions(state, u, s, decay=decay, method=method)


def merge_directions(state: FDState, u: jax.Array, s: jax.Array, *, decay: ArrayLike, method: str) -> FDState:
    """Like :func:`frequent_directions_update`, from the left singular vectors and values of the columns."""
    rank = state.sketch.shape[-1]
    if s.shape[-1] <= rank:
        raise ValueError(
            f"columns: expected [..., m, n] with min(m, n) above the rank of the sketch, {rank}, got {s.shape[-1]}"
        )
    added = u[..., :rank] * _shrunk(s, rank)[..., None, :]
    old = jnp.asarray(decay).astype(u.dtype) * state.sketch
    u, s = left_singular(jnp.concatenate([old, added], axis=-1), method)
    sigma, basis = _shrunk(s, rank), u[..., :rank]
    return FDState(basis * sigma[..., None, :], sigma, basis)


def _shrunk(s, rank):
    return jnp.sqrt(jnp.maximum(jnp.square(s[..., :rank]) - jnp.square(s[..., rank : rank + 1]), 0))


def left_singular(x: jax.Array, method: str) -> tuple[jax.Array, jax.Array]:
    """Left singular vectors ``[..., m, min(m, n)]`` with canonical signs, and singular values.

    Args:
      x: ``[..., m, n]``, float32 or float64.
      method: "svd" or "gram_eigh".

    Returns:
      The vectors, and the values, descending.

    Raises:
      ValueError: The method is unknown, or ``x`` is no matrix.
      TypeError: ``x`` is neither float32 nor float64.
    """
    if method not in SVD_METHODS:
        raise ValueError(f"method: expected one of {SVD_METHODS}, got {method!r}")
    if method == "svd":
        return canonical_svd(x)[:2]
    check_matrix("x", x)
    kept = min(x.shape[-2:])
    # Scaled, so that squares of small gradients don't underflow.
    size = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    size = jnp.where(size > 0, size, 1)
    x = x / size
    values, u = of_each(jnp.linalg.eigh, times(x, x.mT))
    u = u[..., ::-1][..., :kept]
    s = jnp.sqrt(jnp.maximum(values[..., ::-1][..., :kept], 0)) * size[..., 0]
    return u * canonical_signs(u)[..., None, :], s
