"""Row and column sums of squares of ``x^T d``, fused or a part at a time.

XLA for TPUs fuses the squares and both sums into the matmul, so that the gradient exists in registers only.  Other
compilers would write it; and if tokens are sharded, their sum precedes the square.
"""

import functools
import math

import jax
import jax.numpy as jnp

from subspace_jax import linalg

_PART_BYTES = 16 << 20  # of the gradient, at a time
_RUNS = 16  # of features, each of which may be on another device


def energies(x, d, *, axes, block):
    """Returns ``[in]`` and ``[out]`` of ``x [tokens, in]`` and ``d [tokens, out]``; mesh ``axes`` shard tokens."""
    parts = functools.partial(in_parts, axes=axes, block=block)
    if axes or block:
        return parts(x, d)
    return jax.lax.platform_dependent(x, d, tpu=at_once, default=parts)


def at_once(x, d):
    """Computes the energies from all of the gradient."""
    square = jnp.square(_dot(x, d))
    return jnp.sum(square, axis=1), jnp.sum(square, axis=0)


def in_parts(x, d, *, axes, block):
    """Computes the energies from ``block`` rows of the gradient at a time."""
    tokens, rows = x.shape
    # Each part takes some rows of every run: if rows are sharded, each device works on its own.
    runs = math.gcd(rows, _RUNS)
    wanted = block or _PART_BYTES // (4 * d.shape[1])
    parts = next(n for n in range(1, rows // runs + 1) if rows // runs % n == 0 and rows <= n * max(wanted, runs))
    x = x.reshape(tokens, runs, parts, rows // runs // parts)

    def add(i, sums):
        by_row, by_column = sums
        part = _dot(jax.lax.dynamic_index_in_dim(x, i, axis=2, keepdims=False), d)
        square = jnp.square(jax.lax.psum(part, axes) if axes else part)
        by_row = jax.lax.dynamic_update_index_in_dim(by_row, jnp.sum(square, axis=-1), i, axis=1)
        return by_row, by_column + jnp.sum(square, axis=(0, 1))

    dtype = linalg.working_dtype(x, d)
    # Within a shard_map that checks types: a sum over devices that shard tokens does not vary over them.
    varying = frozenset().union(*(jax.typeof(y).manual_axis_type.varying for y in (x, d))) - set(axes)
    start = jnp.zeros(x.shape[1:], dtype), jnp.zeros(d.shape[1:], dtype)
    start = jax.lax.pcast(start, tuple(sorted(varying)), to="varying") if varying else start
    by_row, by_column = jax.lax.fori_loop(0, parts, add, start)
    return by_row.reshape(rows), by_column


def _dot(x, d):
    dims = (((0,), (0,)), ((), ()))
    if x.dtype.itemsize == 2:
        return jax.lax.dot_general(x, d, dims, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(x, d, dims, precision=jax.lax.Precision.HIGHEST)
