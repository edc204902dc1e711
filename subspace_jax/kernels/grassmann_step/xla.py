"""Reference: inner products, the step in ``k x k`` matrices, and one combination per result."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from subspace_jax.kernels.grassmann_step.arguments import StepArrays, StepOptions
from subspace_jax.kernels.grassmann_step.coefficients import BOUNDED, LONGEST, SHORT, combinations
from subspace_jax.linalg import eye_like, gram, times


def tangent_part(s: jax.Array, x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Returns ``X - S (S^T X)``; n is sharded over mesh ``axes``."""
    overlap = gram(s, x)
    return x - _combine(s, jax.lax.psum(overlap, tuple(axes)) if axes else overlap)


def step(arrays: StepArrays, options: StepOptions, *, axes: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Returns new bases, or their difference from the old ones, and the transported direction.

    Args:
      arrays: The arrays; n is sharded over mesh ``axes``.
      options: The options.
      axes: Mesh axes.
    """
    s, grads, momentum, due = arrays.s, arrays.grads, arrays.momentum, arrays.due

    def summed(x):
        return jax.lax.psum(x, tuple(axes)) if axes else x

    d = grads if momentum is None else arrays.rates[0] * momentum + arrays.rates[1] * grads
    overlap = summed(gram(s, d))
    h = d - _combine(s, overlap)
    square = summed(gram(h, h))
    none = jnp.zeros_like(square)
    drift = none if due is None else jax.lax.cond(due, lambda s: _drift(s, axes), lambda s: none, s)
    size, length = _bounded_size(square, arrays.size[..., None, None])
    update, carried = combinations(overlap, square, drift, size, options.transport, options.retraction, BOUNDED)
    moved = _combine(s, update.of_s) + _combine(d, update.of_d)
    if carried is not None:
        d = _combine(s, carried.of_s) + _combine(d, carried.of_d)
    # The error of the k x k matrices grows with the square of the length.
    moved = jax.lax.cond(jnp.any(length > SHORT), lambda: _orthonormal(s + moved, summed) - s, lambda: moved)
    return moved if options.difference else s + moved, d


def _bounded_size(square, size):
    """Returns the size of a step of at most 64 radians, and its length ``[..., 1, 1]``."""
    norm = jnp.sqrt(jnp.max(jnp.sum(jnp.abs(square), axis=-1), axis=-1)[..., None, None])
    length = jnp.abs(size) * norm
    return size * (LONGEST / jnp.maximum(length, LONGEST)), length


def _orthonormal(s, summed):
    """Takes two Newton steps towards the nearest orthonormal bases."""
    for _ in range(2):
        square = summed(gram(s, s))
        s = _combine(s, 1.5 * eye_like(square) - 0.5 * square)
    return s


def _drift(s: jax.Array, axes: Sequence[str]) -> jax.Array:
    # Each shard of the rows subtracts its part of the identity.
    return jax.lax.psum(defect(s, jax.lax.axis_size(tuple(axes))), tuple(axes)) if axes else defect(s)


def defect(s: jax.Array, shards: int = 1) -> jax.Array:
    """Returns ``S^T S - I``, to a small part of a rounding of ``I`` if S is nearly orthonormal.

    The identity is subtracted from the terms of the sum, so that no partial sum comes near 1.

    Args:
      s: ``[..., n, k]``, float32 or float64.
      shards: If S is one of several shards of the rows, their number: the result is ``S^T S - I / shards``.

    Returns:
      ``[..., k, k]``.
    """
    square = gram(s, s)
    lengths = jnp.sum(s * s - 1 / (s.shape[-2] * shards), axis=-2)
    eye = eye_like(square)
    return square * (1 - eye) + lengths[..., None] * eye


def _combine(s: jax.Array, m: jax.Array) -> jax.Array:
    """Returns ``S m``, for few columns as a sum of columns times rows.

    Such sums fuse with the additions around them; the result of a matmul is written and read again.
    """
    k = m.shape[-2]
    if k > 32:
        return times(s, m)
    return functools.reduce(jnp.add, (s[..., :, i : i + 1] * m[..., i : i + 1, :] for i in range(k)))
