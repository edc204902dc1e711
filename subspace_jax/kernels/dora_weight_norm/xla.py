"""Squared norms of adapted columns, from matmuls with the factors or from the adapted weight.

On TPUs XLA fuses the sum, the square and the reduction into the matmul ``a b``, so that the adapted weight exists in
registers only: the plain form reads W once and does not cancel.  Other compilers would write the adapted weight; the
factored form serves them.
"""

import functools

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.kernels._shards import vary_alike
from subspace_jax.kernels.dora_weight_norm.chunks import norm_chunk_size

# Below this fraction of ||W_j||^2 the factored sum has lost four digits, and the plain form is used.
_CANCELS = 1e-4
_PLAIN_BYTES = 8 << 20  # of the rows of the adapted weight that the plain form holds at a time


def norms(w, a, b, scale, energy=None, *, budget, axes):
    """Returns the norms ``[..., out]`` of the columns of ``W + s a b``.

    If a sum of squares is out of range, columns are scaled and computed again; not on TPUs, where the test would need a
    collective for columns that are sharded over Auto mesh axes.
    """
    total = squares(w, a, b, scale, energy, budget=budget, axes=axes)
    again = functools.partial(_again, axes=axes)
    return jax.lax.platform_dependent(total, w, a, b, scale, tpu=lambda total, *_: _root(total), default=again)


def _root(total):
    return jnp.sqrt(jnp.maximum(total, 0))


def _again(total, w, a, b, scale, *, axes):
    info = jnp.finfo(total.dtype)
    in_range = (total > info.tiny / info.eps**2) & (total < info.max)

    def anew(total):
        return jnp.where(in_range, _root(total), _scaled_norms(w, a, b, scale, axes))

    return jax.lax.cond(jnp.all(in_range), _root, anew, total)


def _scaled_norms(w, a, b, scale, axes):
    """Computes the plain form of columns that are divided by their largest entry first."""
    wide = scale.dtype

    def parts(f, join):
        return _in_parts(lambda w, a: f(w.astype(wide) + scale * _dot(a, b).astype(wide)), w, a, join, wide)

    largest = parts(lambda v: jnp.max(jnp.abs(v), axis=-2), jnp.maximum)
    largest = jax.lax.pmax(largest, axes) if axes else largest
    size = linalg.binary_scale(largest[..., None], -1)[..., 0]
    total = parts(lambda v: jnp.sum(jnp.square(v / size[..., None, :]), axis=-2), jnp.add)
    return size * jnp.sqrt(jax.lax.psum(total, axes) if axes else total)


def squares(w, a, b, scale, energy=None, *, budget, axes):
    """Returns the squared norms ``[..., out]`` of the columns of ``W + s a b``.

    Args:
      w: ``[..., in, out]``.
      a: ``[..., in, r]``.
      b: ``[..., r, out]``.
      scale: Scalar of the type of computation.
      energy: ``[..., out]``, squared norms of the columns of W, or None.
      budget: Bytes for copies in the type of computation, None for one matmul with all rows.
      axes: Mesh axes that shard the rows.
    """

    def summed(x):
        return jax.lax.psum(x, axes) if axes else x

    factored = functools.partial(factored_squares, budget=budget, summed=summed)
    return jax.lax.platform_dependent(
        w,
        a,
        b,
        scale,
        energy,
        tpu=lambda w, a, b, scale, _: summed(plain_squares(w, a, b, scale)),
        default=factored,
    )


def plain_squares(w, a, b, scale):
    """Returns squared norms of the columns of ``W + s a b`` by definition."""
    return jnp.sum(jnp.square(w.astype(scale.dtype) + scale * _dot(a, b).astype(scale.dtype)), axis=-2)


def factored_squares(w, a, b, scale, energy, *, budget=None, summed=lambda x: x):
    """Returns the sum of three terms, and the plain form if they cancel."""
    sums = _sums(w, a, energy is None) if budget is None else _sums_in_chunks(w, a, energy is None, budget)
    energies, product, gram = summed(sums)
    energies = (energies if energy is None else energy).astype(scale.dtype)
    wide, product, gram = (x.astype(scale.dtype) for x in (b, product, gram))
    cross = jnp.sum(wide * product, axis=-2)
    own = jnp.sum(wide * _dot(gram, wide), axis=-2)
    total = (energies + 2 * scale * cross) + scale * scale * own
    cancelled = total < _CANCELS * energies

    def exact(total):
        return jnp.where(cancelled, summed(_plain_in_parts(w, a, b, scale)), total)

    return jax.lax.cond(jnp.any(cancelled), exact, lambda total: total, total)


def column_energy(w):
    """Returns the squared norms ``[..., out]`` of the columns."""
    return jnp.sum(jnp.square(w.astype(linalg.working_dtype(w))), axis=-2)


def _sums(w, a, with_energy):
    energies = column_energy(w) if with_energy else None
    return energies, _dot(a.mT, w), _dot(a.mT, a)


def _sums_in_chunks(w, a, with_energy, budget):
    (rows, columns), rank = w.shape[-2:], a.shape[-1]
    chunk = norm_chunk_size(columns, rows, rank, linalg.working_dtype(w, a).itemsize, budget)
    whole = rows - rows % chunk

    def part(start, size):
        wide, tall = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=-2) for x in (w, a))
        return _sums(wide, tall, with_energy)

    def add(i, sums):
        return jax.tree.map(jnp.add, sums, part(i * chunk, chunk))

    # The remainder comes first, so that the loop starts from sums of the right shape.
    shapes = jax.eval_shape(functools.partial(part, 0, chunk))
    sums = jax.tree.map(lambda x: vary_alike(jnp.zeros(x.shape, x.dtype), w)[0], shapes)
    if whole < rows:
        sums = part(whole, rows - whole)
    return jax.lax.fori_loop(0, whole // chunk, add, sums)


def _plain_in_parts(w, a, b, scale):
    """Computes the plain form, with a few rows of the adapted weight at a time."""
    return _in_parts(lambda w, a: plain_squares(w, a, b, scale), w, a, jnp.add, scale.dtype)


def _in_parts(f, w, a, join, dtype):
    """Reduces ``f`` of a part of the rows of w and a, ``[..., out]`` and not negative, over all parts."""
    *lead, rows, columns = w.shape
    wanted = max(1, w.size * dtype.itemsize // _PLAIN_BYTES)
    # A part takes every parts-th row: if rows are sharded, each device works on its own.
    parts = max(n for n in range(1, min(wanted, 64) + 1) if rows % n == 0)
    w, a = (x.reshape(*lead, rows // parts, parts, x.shape[-1]) for x in (w, a))

    def add(i, total):
        wide, tall = (jax.lax.dynamic_index_in_dim(x, i, axis=-2, keepdims=False) for x in (w, a))
        return join(total, f(wide, tall))

    total, _ = vary_alike(jnp.zeros((*lead, columns), dtype), w)
    return jax.lax.fori_loop(0, parts, add, total)


def gradients(w, a, b, scale, inverse, weights):
    """Returns gradients of ``sum_j weights_j n_j`` for ``W, a, b``, with n the column norms of ``V = W + s a b``.

    ``da = s V k b^T`` and ``db = s a^T V k`` with ``k = diag(weights / n)``, without V; ``dW = V k`` is as large as V,
    and computed only if it is used.  Columns are divided by their norms, ``inverse = 1 / n``, before they are
    multiplied by weights, which may be large.
    """
    dtype = linalg.working_dtype(w, a, b)
    wide = b.astype(dtype)
    inverse, weights = inverse[..., None, :], weights[..., None, :]
    scaled = wide * inverse * weights
    dw = (w.astype(dtype) + scale * _dot(a, wide)) * inverse * weights
    # Factors in the dtype of W, so that a bfloat16 weight is not copied as float32; float16 lacks the range.
    da = _dot(w, scaled.astype(w.dtype if w.dtype == jnp.bfloat16 else dtype).mT) + scale * _dot(
        a.astype(dtype), _dot(wide, scaled.mT)
    )
    db = (_dot(a.mT, w) + scale * _dot(_dot(a.mT, a), wide)) * inverse * weights
    return dw.astype(w.dtype), (scale * da).astype(a.dtype), (scale * db).astype(b.dtype)


def _dot(x, y):
    """Returns ``x y``, with float32 sums of 16-bit factors, in full precision of other types."""
    if x.dtype == y.dtype and x.dtype.itemsize == 2:
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)
    dtype = linalg.working_dtype(x, y)
    return jnp.matmul(x.astype(dtype), y.astype(dtype), precision=jax.lax.Precision.HIGHEST)
