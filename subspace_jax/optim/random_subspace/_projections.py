"""Random linear maps from a short vector to the leaves of a tree, without stored matrices.

A map P has a column for each coordinate of the short vector.  The leaves are a list of shapes; offsets come and
gradients go as lists of arrays of these shapes, in the working dtype.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from subspace_jax import linalg

Shapes = Sequence[tuple[int, ...]]

# Random numbers that are drawn at a time, where a leaf has fewer entries.
_BLOCK_SIZE = 2**20


class DenseProjection(NamedTuple):
    """Gaussian columns that are drawn again at every use, some at a time.

    Attributes:
      key: Data of the random key, uint32.
      norms: ``[dim]``, the lengths of the columns as drawn, over all leaves.
    """

    key: jax.Array
    norms: jax.Array


class StoredProjection(NamedTuple):
    """Stored columns, for small problems and for a given matrix.

    Attributes:
      columns: For each leaf ``[dim, *shape]``; a coordinate's parts in all leaves together have length 1.
    """

    columns: tuple[jax.Array, ...]


class SparseProjection(NamedTuple):
    """Columns with few entries, all of one size within a leaf.

    Attributes:
      positions: For each leaf ``[dim, slots]`` of int32, positions in the flattened leaf.
      signs: For each leaf ``[dim, slots]`` of int8: 1, -1, or 0 for a slot without an entry.
      norms: ``[dim]``, the lengths of the columns as drawn, over all leaves.
    """

    positions: tuple[jax.Array, ...]
    signs: tuple[jax.Array, ...]
    norms: jax.Array


class FastfoodProjection(NamedTuple):
    """Two Hadamard transforms with a permutation and two diagonals: one transform over all leaves, or one for each.

    Attributes:
      signs: For each transform ``[length]`` of int8, 1 or -1.
      order: For each transform ``[length]`` of int32, a permutation.
      gains: For each transform ``[length]``, Gaussian.
    """

    signs: tuple[jax.Array, ...]
    order: tuple[jax.Array, ...]
    gains: tuple[jax.Array, ...]


Projection = DenseProjection | StoredProjection | SparseProjection | FastfoodProjection


def dense(key: jax.Array, shapes: Shapes, dim: int, dtype: DTypeLike) -> DenseProjection:
    """Draws columns ``N(0, 1)`` once, for their lengths."""

    def squares(i, number, shape):
        return jnp.sum(jnp.square(_gaussian_row(key, i, number, shape, dtype)))

    def one(_, number):
        return None, sum(squares(i, number, shape) for i, shape in enumerate(shapes))

    _, total = jax.lax.scan(one, None, jnp.arange(dim, dtype=jnp.uint32))
    return DenseProjection(jax.random.key_data(key), jnp.sqrt(total))


def stored(key: jax.Array, shapes: Shapes, dim: int, dtype: DTypeLike) -> StoredProjection:
    """The columns of :func:`dense`, stored."""
    numbers = jnp.arange(dim, dtype=jnp.uint32)
    rows = [jax.vmap(lambda a, i=i, s=s: _gaussian_row(key, i, a, s, dtype))(numbers) for i, s in enumerate(shapes)]
    norms = jnp.sqrt(sum(jnp.sum(jnp.square(row), axis=tuple(range(1, row.ndim))) for row in rows))
    return StoredProjection(tuple(row / norms.reshape(-1, *(1,) * (row.ndim - 1)) for row in rows))


def sparse(key: jax.Array, shapes: Shapes, dim: int, dtype: DTypeLike) -> SparseProjection:
    """Draws each entry of a leaf of n parameters with probability ``1 / sqrt(n)`` (Li, Hastie, Church, KDD 2006).

    Only the gaps between entries are drawn.  A column has slots for six standard deviations more entries than is
    usual, so that one in a billion lacks its last ones.
    """
    positions, signs = [], []
    for i, shape in enumerate(shapes):
        size = math.prod(shape)
        slots = min(size, math.ceil(size**0.5 + 6 * size**0.25) + 8)
        gap_key, sign_key = jax.random.split(jax.random.fold_in(key, i))
        # With probability 1 an entry follows at once; otherwise gaps are geometric.
        uniform = jax.random.uniform(gap_key, (dim, slots), jnp.float32, minval=jnp.finfo(jnp.float32).tiny)
        rate = math.log1p(-(size**-0.5)) if size > 1 else -math.inf
        gaps = jnp.floor(jnp.log(uniform) / np.float32(rate)).astype(jnp.int32) + 1
        position = jnp.cumsum(gaps, axis=1) - 1
        sign = jax.random.rademacher(sign_key, (dim, slots), jnp.int8)
        signs.append(jnp.where(position < size, sign, jnp.int8(0)))
        positions.append(jnp.minimum(position, size - 1))
    return SparseProjection(tuple(positions), tuple(signs), _sparse_norms(shapes, signs, dim, dtype))


def _sparse_norms(shapes, signs, dim, dtype):
    counts = [jnp.sum(jnp.abs(sign).astype(dtype), axis=1) for sign in signs]
    squares = sum(
        count * np.asarray(_entry(shape, dim) ** 2, dtype) for count, shape in zip(counts, shapes, strict=True)
    )
    # A column without any entry, possible where all leaves are tiny, moves nothing.
    return jnp.where(squares > 0, jnp.sqrt(squares), 1)


def _entry(shape: tuple[int, ...], dim: int) -> float:
    return math.prod(shape) ** 0.25 / dim**0.5


def fastfood(key: jax.Array, shapes: Shapes, dim: int, dtype: DTypeLike, *, by_leaf: bool) -> FastfoodProjection:
    """Draws the diagonals and the permutation of each transform."""
    parts = []
    for i, size in enumerate(_transform_sizes(shapes, by_leaf)):
        length = transform_length(size, dim)
        if length > 2**31:
            raise ValueError(
                f"params: expected at most {2**31} parameters under one transform, got {size}; "
                "scope='leaf' has one for each leaf, and select takes fewer"
            )
        sign_key, order_key, gain_key = jax.random.split(jax.random.fold_in(key, i), 3)
        signs = jax.random.rademacher(sign_key, (length,), jnp.int8)
        order = jax.random.permutation(order_key, length).astype(jnp.int32)
        parts.append((signs, order, jax.random.normal(gain_key, (length,), dtype)))
    return FastfoodProjection(*map(tuple, zip(*parts, strict=True)))


def transform_length(size: int, dim: int) -> int:
    """The power of two that holds a leaf and, so that no coordinate is lost in a small one, the short vector."""
    return 1 << (max(size, dim) - 1).bit_length()


def _transform_sizes(shapes: Shapes, by_leaf: bool) -> list[int]:
    sizes = [math.prod(shape) for shape in shapes]
    return sizes if by_leaf else [sum(sizes)]


def apply(projection: Projection, theta: jax.Array, shapes: Shapes) -> list[jax.Array]:
    """Returns ``P theta`` as a list of arrays of these shapes; linear in ``theta [dim]``, and differentiable."""
    if isinstance(projection, DenseProjection):
        return _apply_dense(projection, theta, shapes)
    if isinstance(projection, StoredProjection):
        full = jax.lax.Precision.HIGHEST
        return [jnp.tensordot(theta, columns, axes=1, precision=full) for columns in projection.columns]
    if isinstance(projection, SparseProjection):
        return _apply_sparse(projection, theta, shapes)
    by_leaf = len(projection.signs) > 1 or len(shapes) == 1
    parts = zip(*projection, _transform_sizes(shapes, by_leaf), strict=True)
    flat = [_fastfood(theta, *part) for part in parts]
    if not by_leaf:
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        flat = jnp.split(flat[0], ends)
    return [x.reshape(shape) for x, shape in zip(flat, shapes, strict=True)]


def _fastfood(theta, signs, order, gains, size):
    length = signs.shape[0]
    u = jnp.pad(theta, (0, length - theta.shape[0])) * signs.astype(theta.dtype)
    u = linalg.fwht(u, normalized=True)
    u = u.at[order].get(unique_indices=True, mode="promise_in_bounds") * gains
    u = linalg.fwht(u, normalized=True)[:size]
    # The authors' divisor sqrt(L sum G^2) sqrt(D / L), for transforms that are orthogonal and so keep numbers small.
    return u * (length / jnp.sqrt(jnp.sum(jnp.square(gains)) * size))


def _apply_dense(projection, theta, shapes):
    key = jax.random.wrap_key_data(projection.key)
    weights, dim = theta / projection.norms, theta.shape[0]
    offsets = []
    for i, shape in enumerate(shapes):
        rows = max(1, min(dim, _BLOCK_SIZE // max(1, math.prod(shape))))
        blocks = -(-dim // rows)
        numbers = jnp.arange(blocks * rows, dtype=jnp.uint32).reshape(blocks, rows)
        padded = jnp.pad(weights, (0, blocks * rows - dim)).reshape(blocks, rows)

        # Without this, the backward pass would find every block kept, which together are the whole matrix.
        @jax.checkpoint
        def block(weights, numbers, i=i, shape=shape):
            draw = jax.vmap(lambda a: _gaussian_row(key, i, a, shape, theta.dtype))
            return jnp.tensordot(weights, draw(numbers), axes=1, precision=jax.lax.Precision.HIGHEST)

        def add(total, part, block=block):
            return total + block(*part), None

        offsets.append(jax.lax.scan(add, jnp.zeros(shape, theta.dtype), (padded, numbers))[0])
    return offsets


def _gaussian_row(key, leaf, number, shape, dtype):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, leaf), number), shape, dtype)


def _apply_sparse(projection, theta, shapes):
    weights, offsets = theta / projection.norms, []
    for positions, signs, shape in zip(projection.positions, projection.signs, shapes, strict=True):
        size = math.prod(shape)
        entry = np.asarray(_entry(shape, theta.shape[0]), theta.dtype)
        values = signs.astype(theta.dtype) * (weights * entry)[:, None]
        flat = jnp.zeros(size, theta.dtype).at[positions].add(values, mode="promise_in_bounds")
        offsets.append(flat.reshape(shape))
    return offsets
