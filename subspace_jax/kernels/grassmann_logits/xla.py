"""Norms of projections onto class subspaces and their derivatives, a group of classes at a time.

The products of a group with all features have the layout ``[classes, k, batch]``: a TPU stores bases as
``[classes, k, n]``, so that the derivatives need no copy of the bases, and XLA fuses the sum over k into the matmul.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from subspace_jax.kernels._shards import vary_alike
from subspace_jax.linalg import binary_scale, working_dtype

# Bytes of the products, and of the bases, of a group: a few of both fit into the VMEM of a TPU and the cache of a GPU.
_BLOCK_BYTES = 16 << 20
# Larger bases are sharded over several devices, with gradients and momenta of the same size: a group grows in
# proportion.
_DEVICE_BYTES = 32 << 30
# Devices over which classes may be sharded without a collective; the larger number for large groups.
_SHARDS, _MOST_SHARDS = 64, 512
_TILE = 8  # rows of a tile of a TPU's layout


def norms(x, bases, *, block):
    """Returns lengths ``[..., classes]`` of ``S_c^T x``, for ``x [..., n]`` and ``bases [classes, n, k]``."""
    features, size, wide = _features(x)
    classes = _Classes(bases, features.shape[0], block)

    def add(out, start, width):
        z = classes.products(classes.rows(start, width, x.dtype), features, x.dtype)
        return classes.put(out, jnp.sqrt(jnp.sum(jnp.square(z), axis=2)) * size.T[None], start)

    out = jnp.zeros((*classes.split, features.shape[0]), wide)
    out = classes.loop(add, vary_alike(features, out)[1])
    return out.reshape(classes.count, -1).T.reshape(*x.shape[:-1], classes.count)


def gradients(x, bases, gamma, norms, weights, *, block, mesh_axes=((), ())):
    """Returns gradients of ``gamma * sum(weights * norms)`` with respect to ``x`` and ``bases``.

    That of a norm of zero is zero.  They are summed over ``mesh_axes``, those that shard the classes and those that
    shard the rows of ``x``; those of bases group by group, as one sum of all would need a second buffer of their size.
    """
    class_axes, row_axes = mesh_axes
    features, size, wide = _features(x)
    batch = features.shape[0]
    classes = _Classes(bases, batch, block)
    norms, weights = (a.reshape(batch, -1).T.reshape(*classes.split, batch) for a in (norms, weights.astype(wide)))

    def add(sums, start, width):
        dx, dbases = sums
        rows = classes.rows(start, width, x.dtype)
        # With x = size features: norms of features, and weights of which products with features are gradients of bases.
        # Group by group, as scaling all would need another array of the size of the logits.
        length, weight = (classes.take(a, start, width) for a in (norms, weights))
        length, weight = length / size.T[None], weight * (gamma * size.T[None])
        weight = jnp.where(length > 0, weight / jnp.where(length > 0, length, 1), 0)
        z = weight[:, :, None] * classes.products(rows, features, x.dtype)
        # The barrier keeps the compiler from recomputing it for each matmul.
        z = jax.lax.optimization_barrier(_round(z.reshape(-1, batch), x.dtype))
        dx = dx + _dot("pb,pn->bn", z, rows, x.dtype)
        group = classes.bases_of(_dot("pb,bn->pn", z, features, x.dtype))
        return dx, classes.put(dbases, jax.lax.psum(group, row_axes) if row_axes else group, start)

    sums = jnp.zeros(features.shape, wide), jnp.zeros(classes.bases.shape, wide)
    dx, dbases = classes.loop(add, tuple(vary_alike(features, *sums)[1:]))
    dx = jax.lax.psum(dx, class_axes) if class_axes else dx
    return (dx / size).reshape(x.shape).astype(x.dtype), dbases.reshape(bases.shape).astype(bases.dtype)


def _features(x):
    """Returns features ``[batch, n]`` divided by powers of two ``[batch, 1]``, so that their squares are in range."""
    wide = working_dtype(x)
    x = x.reshape(-1, x.shape[-1]).astype(wide)
    size = binary_scale(x, -1)
    return x / size, size, wide


def _round(x, dtype):
    # XLA for TPUs would hoist a cast out of the loop, with a copy of all bases.
    return jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x


def _dot(rule, x, y, dtype):
    """Returns a matmul with sums in at least float32, of factors from :func:`_round`."""
    if dtype != jnp.bfloat16:
        return jnp.einsum(rule, x, y, precision=jax.lax.Precision.HIGHEST)

    def wide(x, y):  # The matrix unit rounds float32 to bfloat16.
        return jnp.einsum(rule, x, y, precision=jax.lax.Precision.DEFAULT)

    def narrow(x, y):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jnp.einsum(rule, x, y, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(x, y, tpu=wide, default=narrow)


class _Classes:
    """Bases ``[classes, n, k]`` in groups of about ``block`` classes.

    If classes are sharded over Auto mesh axes, each group needs a part of every shard for a loop to need no collective:
    the classes are divided into runs, and a group takes a piece of each run.
    """

    def __init__(self, bases: jax.Array, batch: int, block: int | None):
        self.count, self.n, self.k = bases.shape
        devices = -(-4 * self.count * self.n * self.k // _DEVICE_BYTES)
        wanted = block or devices * _BLOCK_BYTES // (4 * self.k * max(batch, self.n))
        runs = _runs(self.count, wanted) if wanted < self.count else 1
        self.split = runs, self.count // runs
        self.width = _width(self.split[1], max(1, wanted // runs))
        self.bases = bases.reshape(*self.split, self.n, self.k)

    def take(self, a: jax.Array, start, width: int) -> jax.Array:
        return a if width == a.shape[1] else jax.lax.dynamic_slice_in_dim(a, start, width, 1)

    def put(self, a: jax.Array, piece: jax.Array, start) -> jax.Array:
        return piece if piece.shape == a.shape else jax.lax.dynamic_update_slice_in_dim(a, piece, start, 1)

    def rows(self, start, width: int, dtype) -> jax.Array:
        """Returns the basis vectors ``[classes k, n]`` of a group, rounded to ``dtype``."""
        piece = jnp.swapaxes(self.take(self.bases, start, width), 2, 3).reshape(-1, self.n)
        # Without the barrier XLA for v6e changes the layout of all bases.
        piece = jax.lax.optimization_barrier(piece)
        return _round(piece.astype(working_dtype(jnp.zeros((), dtype))), dtype)

    def bases_of(self, rows: jax.Array) -> jax.Array:
        """Returns the bases of a group, the inverse of :meth:`rows`."""
        return jnp.swapaxes(rows.reshape(self.split[0], -1, self.k, self.n), 2, 3)

    def products(self, rows: jax.Array, features: jax.Array, dtype) -> jax.Array:
        """Returns the products ``[runs, width, k, batch]``."""
        z = _dot("pn,bn->pb", rows, features, dtype)
        return z.reshape(self.split[0], -1, self.k, features.shape[0])

    def loop(self, add: Callable, sums):
        """Folds ``add(sums, start, width)`` over all groups."""
        length, width = self.split[1], self.width
        if width == length:
            return add(sums, 0, width)
        if rest := length % width:
            sums = add(sums, length - rest, rest)
        return jax.lax.fori_loop(0, length // width, lambda i, sums: add(sums, i * width, width), sums)


def _width(length: int, wanted: int) -> int:
    """Returns the classes per run and group, if possible a divisor of the run."""
    step = _TILE if wanted >= _TILE else 1
    most = min(length, wanted - wanted % step)
    return next((width for width in range(most, most // 2, -step) if length % width == 0), most)


def _runs(count: int, wanted: int) -> int:
    """Returns the number of runs for groups of ``wanted`` classes."""
    runs = _MOST_SHARDS
    while runs >= 4:
        # Pieces of few classes are small matmuls; for pieces of less than a tile, a TPU changes the layout.
        if runs <= max(_SHARDS, wanted // 4) and count % (_TILE * runs) == 0:
            return runs
        runs //= 2
    return math.gcd(count, _SHARDS)
