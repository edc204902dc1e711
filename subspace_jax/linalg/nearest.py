"""Distances between the rows of two matrices, and the nearest rows."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg.products import times, working_dtype
from subspace_jax.linalg.row_blocks import map_row_blocks

_QUERIES_AT_A_TIME = 1024
_GROUP = 32


def pairwise_sq_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared Euclidean distances between rows.

    Computed from inner products, hence with an absolute error of rounding times the squared lengths: two rows that
    nearly coincide may have distance 0.

    Args:
      a: ``[n, d]``, floating point.
      b: ``[m, d]``.

    Returns:
      ``[n, m]``, at least 0; float32 or wider.

    Raises:
      ValueError: Shapes do not match.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: expected rows of one width [n, d] and [m, d], got {a.shape} and {b.shape}")
    dtype = working_dtype(a, b)
    a, b = a.astype(dtype), b.astype(dtype)
    squares = jnp.sum(jnp.square(a), axis=1)[:, None] + jnp.sum(jnp.square(b), axis=1)[None]
    return jnp.maximum(squares - 2 * times(a, b.T), 0)


def nearest_rows(
    queries: jax.Array, rows: jax.Array, k: int, *, exclude: jax.Array | None = None, block_size: int = 4096
) -> tuple[jax.Array, jax.Array]:
    """The nearest rows of each query in Euclidean distance, by exact search.

    Holds 1024 x ``block_size`` distances at a time; the queries may be sharded.

    Args:
      queries: ``[queries, d]``, floating point.
      rows: ``[rows, d]``.
      k: Number of rows to find.
      exclude: ``[queries]`` integers: a row that is not to be found, such as the query itself; -1 for none.
      block_size: Rows compared at a time.

    Returns:
      Squared distances and indices, ``[queries, k]`` each, the nearest first and the lower index first of equal ones;
      infinity and an index beyond the rows where none is left.

    Raises:
      ValueError: Shapes do not match, or ``k`` is not between 1 and the number of rows.
    """
    if queries.ndim != 2 or rows.ndim != 2 or queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries, rows: expected vectors of one width, got {queries.shape} and {rows.shape}")
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k: expected 1 to {rows.shape[0]}, the number of rows, got {k}")
    dtype = working_dtype(queries, rows)
    exclude = jnp.full(queries.shape[:1], -1) if exclude is None else exclude
    # The centre of the rows as the origin: distances are those of inner products, rounded by the lengths.
    center = jnp.mean(rows.astype(dtype), axis=0, keepdims=True)
    rows, queries = rows.astype(dtype) - center, queries.astype(dtype) - center
    num_rows, num_blocks = rows.shape[0], -(-rows.shape[0] // block_size)
    padded = jnp.pad(rows, [(0, num_blocks * block_size - num_rows if num_blocks > 1 else 0), (0, 0)])
    blocks = padded.reshape(num_blocks, -1, rows.shape[1])
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * blocks.shape[1]

    def of_some(args):
        some, without = args

        def merge(found, block):
            vectors, start = block

            def is_out(index):
                return (index == without[:, None]) | (index >= num_rows)

            index = start + jnp.arange(vectors.shape[0], dtype=jnp.int32)[None]
            distance = jnp.where(is_out(index), jnp.inf, pairwise_sq_distances(some, vectors))
            distance, at = _smallest(distance, min(k, vectors.shape[0]))
            distances = jnp.concatenate([found[0], distance], axis=1)
            index = jnp.concatenate([found[1], jnp.where(is_out(start + at), num_rows, start + at)], axis=1)
            nearest, at = jax.lax.top_k(-distances, k)
            return (-nearest, jnp.take_along_axis(index, at, axis=1)), None

        nothing = (jnp.full((some.shape[0], k), jnp.inf, dtype), jnp.full((some.shape[0], k), num_rows, jnp.int32))
        return jax.lax.scan(merge, nothing, (blocks, starts))[0]

    return tuple(map_row_blocks(of_some, (queries, exclude.astype(jnp.int32)), _QUERIES_AT_A_TIME))


def _smallest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The smallest entries of each row of ``x [m, n]`` and their int32 columns, the lower of equal ones first."""
    m, n = x.shape
    if n % _GROUP or n < 2 * k * _GROUP:
        values, at = jax.lax.top_k(-x, k)
        return -values, at.astype(jnp.int32)
    # They are in the groups of columns with the smallest minima, which are cheap to find: a sort of far fewer entries.
    groups = x.reshape(m, -1, _GROUP)
    chosen = jnp.sort(jax.lax.top_k(-jnp.min(groups, axis=2), k)[1].astype(jnp.int32), axis=1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(m, -1)
    columns = (chosen[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)[None, None]).reshape(m, -1)
    values, at = jax.lax.top_k(-candidates, k)
    return -values, jnp.take_along_axis(columns, at, axis=1)
