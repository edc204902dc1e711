"""K-subspaces: clusters of rows, each near a linear or affine subspace of its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_finite, check_integer
from subspace_jax.linalg.bases import random_orthonormal
from subspace_jax.linalg.products import gram, times, working_dtype
from subspace_jax.linalg.row_blocks import map_row_blocks

_NUMBERS_AT_A_TIME = 2**22
_MAX_STEPS = 100


class KSubspaces(NamedTuple):
    """A clustering of rows by subspaces.

    Attributes:
      bases: ``[k, n, d]``, orthonormal.
      means: ``[k, n]``, a point of each subspace; 0 of linear ones.
      assignments: ``[rows]`` int32, the nearest subspace of each row.
      objective: ``[]``, the mean over rows of the squared length that the row's subspace explains: ``|x|^2`` less the
        squared distance to it.
      steps: ``[]`` int32, updates of the subspaces.
    """

    bases: jax.Array
    means: jax.Array
    assignments: jax.Array
    objective: jax.Array
    steps: jax.Array


def k_subspaces(
    key: jax.Array,
    x: jax.Array,
    k: int,
    d: int,
    *,
    restarts: int = 20,
    init: jax.Array | None = None,
    affine: bool = False,
) -> KSubspaces:
    """Assigns rows to subspaces and fits subspaces to rows in turns (Bradley and Mangasarian 2000; Tseng 2000).

    The objective never decreases.  A start ends when no assignment changes, or after 100 steps.  Random starts come in
    batches.  A step costs ``2 rows k n (n + d)`` operations and an eigendecomposition ``[n, n]`` for each subspace; it
    holds ``[k, n, n]`` and ``[rows, k]``.  The rows may be sharded.  A cluster of fewer than ``d`` rows gets further
    directions, orthogonal to them; an empty one is fitted anew to the rows that are explained worst.

    Args:
      key: Key of the starts.
      x: ``[rows, n]``, floating point.
      k: Number of subspaces.
      d: Their dimension.
      restarts: Number of random starts, of which the one with the largest objective is returned.
      init: Assignments ``[rows]`` to begin with, such as those of spectral clustering, in place of random starts.
      affine: Whether the subspaces need not contain the origin.

    Returns:
      The clustering; float32 or wider.

    Raises:
      ValueError: ``x`` is no matrix or (where its values are known) not finite, or another argument is out of range.
      TypeError: ``k``, ``d`` or ``restarts`` is no integer.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected [rows, n], got shape {x.shape}")
    rows, n = x.shape
    k, d, restarts = check_integer("k", k), check_integer("d", d), check_integer("restarts", restarts)
    if not 1 <= k <= rows:
        raise ValueError(f"k: expected 1 to {rows}, the number of rows, got {k}")
    if not 1 <= d <= n:
        raise ValueError(f"d: expected 1 to {n}, the width of the rows, got {d}")
    if restarts < 1:
        raise ValueError(f"restarts: expected at least 1, got {restarts}")
    if init is not None and (init.shape != (rows,) or not jnp.issubdtype(init.dtype, jnp.integer)):
        raise ValueError(f"init: expected integers [{rows}], one for each row, got {init.dtype} {list(init.shape)}")
    check_finite("x", x)
    x = x.astype(working_dtype(x))

    def run(start):
        return _run(x, k, d, start, affine)

    if init is not None:
        everywhere = jnp.full(rows, jnp.inf, x.dtype)
        return run(_fit(x, jnp.asarray(init), everywhere, k, d, affine))

    def begin(key):
        of_bases, of_means = jax.random.split(key)
        bases = random_orthonormal(of_bases, n, d, (k,), x.dtype)
        at = jax.random.choice(of_means, rows, (k,), replace=False) if affine else None
        return run((bases, x[at] if affine else jnp.zeros((k, n), x.dtype)))

    batch = max(1, min(restarts, _NUMBERS_AT_A_TIME // (k * n * n + rows * k + min(rows, _block(k, n)) * k * n)))
    found = jax.lax.map(begin, jax.random.split(key, restarts), batch_size=batch)
    return jax.tree.map(lambda a: a[jnp.argmax(found.objective)], found)


def explained_energy(x: jax.Array, bases: jax.Array, means: jax.Array) -> jax.Array:
    """Squared lengths less squared distances to subspaces: the larger, the nearer.

    Args:
      x: ``[rows, n]``.
      bases: ``[k, n, d]``, orthonormal.
      means: ``[k, n]``, a point of each subspace; 0 of linear ones.

    Returns:
      ``[rows, k]``.
    """
    k, n, d = bases.shape
    # |x|^2 - |x - m|^2 + |U^T (x - m)|^2, without a difference [rows, k, n].  One matmul for bases and means: two
    # of them and the sum are fused by XLA for CPUs (jaxlib 0.10.2), which returns garbage for constant means.
    joined = jnp.concatenate([bases, means[:, :, None]], axis=2)
    products = times(x, jnp.swapaxes(joined, 0, 1).reshape(n, k * (d + 1))).reshape(-1, k, d + 1)
    origin = jnp.einsum("kn,knd->kd", means, bases, precision=jax.lax.Precision.HIGHEST)
    shift = 2 * products[:, :, d] - jnp.sum(jnp.square(means), axis=1)[None]
    return shift + jnp.sum(jnp.square(products[:, :, :d] - origin[None]), axis=2)


def _block(k, n):
    """Rows at a time, so that ``[rows, k, n]`` of them stays small."""
    return max(256, _NUMBERS_AT_A_TIME // (k * n))


def _run(x, k, d, start, affine, max_steps=_MAX_STEPS):
    def assign(bases, means):
        def of_block(block):
            scores = explained_energy(block, bases, means)
            return jnp.argmax(scores, axis=1).astype(jnp.int32), jnp.max(scores, axis=1)

        return map_row_blocks(of_block, x, _block(k, x.shape[1]))

    def step(carry):
        _, _, assignments, scores, _, steps = carry
        bases, means = _fit(x, assignments, scores, k, d, affine)
        now, scores = assign(bases, means)
        return bases, means, now, scores, jnp.any(now != assignments), steps + 1

    carry = (*start, *assign(*start), jnp.bool_(True), jnp.int32(0))
    carry = jax.lax.while_loop(lambda c: c[4] & (c[5] < max_steps), step, carry)
    bases, means, assignments, scores, _, steps = carry
    return KSubspaces(bases, means, assignments, jnp.mean(scores), steps)


def _fit(x, assignments, scores, k, d, affine):
    """The best subspaces of the clusters: the leading eigenvectors of their scatter matrices."""
    count, sums, scatter = _moments(x, assignments, k)
    # An empty cluster: the rows that are explained worst stand in for its own, others for each of several.
    take = min(d + affine, x.shape[0])
    unexplained = jnp.sum(jnp.square(x), axis=1) - scores
    worst = jax.lax.top_k(unexplained, min(k * take, x.shape[0]))[1]
    empty = count == 0
    turn = jnp.maximum(jnp.cumsum(empty) - 1, 0)
    own = x[worst[(turn[:, None] * take + jnp.arange(take)[None]) % worst.shape[0]]]
    count = jnp.where(empty, take, count)
    sums = jnp.where(empty[:, None], jnp.sum(own, axis=1), sums)
    scatter = jnp.where(empty[:, None, None], gram(own, own), scatter)
    means = sums / count[:, None] if affine else jnp.zeros_like(sums)
    scatter = scatter - count[:, None, None] * means[:, :, None] * means[:, None, :]
    return jnp.linalg.eigh(scatter)[1][:, :, ::-1][:, :, :d], means


def _moments(x, assignments, k):
    """Numbers, sums ``[k, n]`` and products ``[k, n, n]`` of the rows of each cluster."""
    rows, n = x.shape
    blocks = -(-rows // _block(k, n))
    # Every so-manieth row, as in map_row_blocks.
    size = -(-rows // blocks)
    padded = jnp.pad(x, ((0, blocks * size - rows), (0, 0))).reshape(size, blocks, n)
    labels = jnp.pad(assignments, (0, blocks * size - rows), constant_values=-1).reshape(size, blocks)

    def add(i, sums):
        block = jax.lax.dynamic_index_in_dim(padded, i, 1, keepdims=False)
        members = jax.nn.one_hot(jax.lax.dynamic_index_in_dim(labels, i, 1, keepdims=False), k, dtype=x.dtype)
        own = (members[:, :, None] * block[:, None, :]).reshape(size, k * n)
        return (
            sums[0] + jnp.sum(members, axis=0),
            sums[1] + jnp.sum(own, axis=0).reshape(k, n),
            sums[2] + gram(own, block).reshape(k, n, n),
        )

    zero = (jnp.zeros(k, x.dtype), jnp.zeros((k, n), x.dtype), jnp.zeros((k, n, n), x.dtype))
    return jax.lax.fori_loop(0, blocks, add, zero)
