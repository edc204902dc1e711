"""Reference: inner products, the step in ``k x k`` matrices, and one combination for each result."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from subspace_jax.kernels.grassmann_step.coefficients import BOUNDED, LONGEST, SHORT, combinations
from subspace_jax.kernels.grassmann_step.gram import defect, tall_gram
from subspace_jax.linalg import eye_like, times


def tangent_part(s: jax.Array, x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """``X - S (S^T X)``; n is split over mesh ``axes``."""
    overlap = tall_gram(s, x)
    return x - _combine(s, jax.lax.psum(overlap, tuple(axes)) if axes else overlap)


def step(s, grads, momentum, rates, size, due, *, transport, retraction, axes: Sequence[str], difference: bool):
    """Moves bases ``[..., n, k]``, and returns what becomes of the direction.

    Args:
      s: Bases, orthonormal up to drift.
      grads: Gradients of the same shape and dtype.
      momentum: Likewise; None for a direction that is the gradient.
      rates: ``[2]``, the factors of momentum and gradient in the direction.
      size: Step size ``[..., 1, 1]``.
      due: Whether to remove drift, boolean scalar; None for never.
      transport: See :func:`combinations`.
      retraction: See :func:`combinations`.
      axes: Mesh axes over which n is split.
      difference: Whether to return ``new - s`` instead of the new bases.
    """

    def summed(x):
        return jax.lax.psum(x, tuple(axes)) if axes else x

    d = grads if momentum is None else rates[0] * momentum + rates[1] * grads
    overlap = summed(tall_gram(s, d))
    h = d - _combine(s, overlap)
    square = summed(tall_gram(h, h))
    none = jnp.zeros_like(square)
    drift = none if due is None else jax.lax.cond(due, lambda s: _drift(s, axes), lambda s: none, s)
    size, length = _ended(square, size)
    update, carried = combinations(overlap, square, drift, size, transport, retraction, BOUNDED)
    moved = _combine(s, update.of_s) + _combine(d, update.of_d)
    if carried is not None:
        d = _combine(s, carried.of_s) + _combine(d, carried.of_d)
    # What k x k matrices know of the new columns is less, by the square of the length.
    moved = jax.lax.cond(jnp.any(length > SHORT), lambda: _orthonormal(s + moved, summed) - s, lambda: moved)
    return moved if difference else s + moved, d


def _ended(square, size):
    """The size of a step that is no longer than 64 radians, and its length ``[..., 1, 1]``."""
    norm = jnp.sqrt(jnp.max(jnp.sum(jnp.abs(square), axis=-1), axis=-1)[..., None, None])
    length = jnp.abs(size) * norm
    return size * (LONGEST / jnp.maximum(length, LONGEST)), length


def _orthonormal(s, summed):
    """Two Newton steps towards the nearest orthonormal bases."""
    for _ in range(2):
        square = summed(tall_gram(s, s))
        s = _combine(s, 1.5 * eye_like(square) - 0.5 * square)
    return s


def _drift(s: jax.Array, axes: Sequence[str]) -> jax.Array:
    # A device's share of the rows has its share of the identity as well.
    return jax.lax.psum(defect(s, jax.lax.axis_size(tuple(axes))), tuple(axes)) if axes else defect(s)


def _combine(s: jax.Array, m: jax.Array) -> jax.Array:
    """``S m``, for few columns as a sum of columns times rows.

    Such sums fuse with what they are added to; a product would be written out and read again, which costs more than
    its arithmetic (measured on CPU up to 32 columns).
    """
    k = m.shape[-2]
    if k > 32:
        return times(s, m)
    return functools.reduce(jnp.add, (s[..., :, i : i + 1] * m[..., i : i + 1, :] for i in range(k)))
