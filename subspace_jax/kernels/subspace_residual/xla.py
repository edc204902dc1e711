"""Residuals and their derivatives, a strip of rows at a time.

Coordinates and reconstructions exist for one strip only.  On TPUs XLA fuses the sums of squares into the matmul with
the complement, so that the complement form needs no strips; in the direct form a strip is fetched once and stays in
VMEM for both matmuls.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from subspace_jax.kernels._shards import vary_alike
from subspace_jax.linalg import times, working_dtype

# Bytes of a strip of centred rows.
_STRIP_BYTES = 1 << 24
_SHARDS = 64
# Rows of a tile of a TPU's layout.
_TILE = 16


def residual(x, mean, basis, *, complement, block):
    """Returns scores ``[...]`` of rows ``x [..., d]``."""
    if not complement and _is_wide(basis):
        basis, complement = _projector(basis), True

    def scores(x):
        work = working_dtype(x, mean, basis)
        rows = x.astype(work) - jnp.broadcast_to(mean.astype(work), x.shape)
        z = _dot(rows, basis)
        return jnp.sum(jnp.square(z if complement else rows - _dot(z, basis.T)), axis=-1)

    def in_strips(x, mean, basis, *, tile=1):
        del mean, basis
        return Strips(x.reshape(-1, x.shape[-1]), block, tile).map(scores).reshape(x.shape[:-1])

    def on_chip(x, mean, basis):
        if complement and block is None:
            return scores(x)
        return in_strips(x, mean, basis, tile=_TILE)

    return jax.lax.platform_dependent(x, mean, basis, tpu=on_chip, default=in_strips)


def gradients(x, mean, basis, weights, *, complement, block):
    """Returns gradients of ``sum(weights * residual)`` with respect to ``x``, ``mean`` and ``basis``."""
    if not complement and _is_wide(basis):
        projector = _projector(basis)
        dx, dmean, total = gradients(x, mean, projector, weights, complement=True, block=block)
        dbasis = -times((total + total.T).astype(working_dtype(basis)), basis.astype(working_dtype(basis)))
        return dx, dmean, dbasis.astype(basis.dtype)
    work = working_dtype(x, mean, basis)

    def of_strip(x, weights):
        rows, weights = x.astype(work) - mean.astype(work)[None], 2 * weights[:, None]
        z = _dot(rows, basis)
        if complement:
            dz = weights * z
            return _dot(dz, basis.T), _dot_rows(rows, dz, basis)
        # If the basis is not orthonormal, the rest has coordinates y.
        rest = rows - _dot(z, basis.T)
        y = _dot(rest, basis)
        return weights * (rest - _dot(y, basis.T)), -_dot_rows(rest, weights * z, basis) - _dot_rows(
            rows, weights * y, basis
        )

    def add(sums, x, weights):
        dx, dbasis = of_strip(x, weights)
        dmean, total = sums
        return (dmean - jnp.sum(dx, axis=0), total + dbasis), dx.astype(x.dtype)

    def in_strips(x, mean, basis, weights, *, tile=1):
        rows = x.reshape(-1, x.shape[-1])
        _, *sums = vary_alike(rows, jnp.zeros(mean.shape, work), jnp.zeros(basis.shape, work))
        weights = weights.reshape(-1).astype(work)
        (dmean, dbasis), dx = Strips(rows, block, tile).accumulate(add, tuple(sums), weights)
        return dx.reshape(x.shape), dmean.astype(mean.dtype), dbasis.astype(basis.dtype)

    on_chip = functools.partial(in_strips, tile=_TILE)
    return jax.lax.platform_dependent(x, mean, basis, weights, tpu=on_chip, default=in_strips)


def _is_wide(basis) -> bool:
    """Whether a matmul with ``I - C C^T`` costs less than those with C and its transpose."""
    return 2 * basis.shape[1] > basis.shape[0]


def _projector(basis):
    wide = basis.astype(working_dtype(basis))
    return (jnp.eye(wide.shape[0], dtype=wide.dtype) - times(wide, wide.T)).astype(basis.dtype)


def _dot(x, y):
    """Returns ``x y``, in bfloat16 with float32 sums if the basis ``y`` is bfloat16."""
    if y.dtype == jnp.bfloat16:
        return jnp.matmul(x.astype(y.dtype), y, preferred_element_type=jnp.float32).astype(x.dtype)
    return jnp.matmul(x, y.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


def _dot_rows(x, y, basis):
    """Returns ``x^T y``, in the precision of the matmuls with the basis."""
    return _dot(x.T, y.astype(basis.dtype) if basis.dtype == jnp.bfloat16 else y)


class Strips:
    """Rows ``[n, d]`` in strips of about ``block`` rows.

    If rows are sharded over Auto mesh axes, each strip needs a part of every shard for a loop to need no collective:
    the rows are divided into runs, and a strip takes a piece of each run.  Runs are multiples of a tile, or a TPU would
    change the layout of all rows.
    """

    def __init__(self, rows: jax.Array, block: int | None, tile: int):
        n, d = rows.shape
        self.runs = math.gcd(n, _SHARDS)
        while self.runs > 1 and n // self.runs % tile:
            self.runs //= 2
        self.length = n // self.runs
        width = max(1, (block or _STRIP_BYTES // (4 * d)) // self.runs)
        self.width = min(width - width % tile if width > tile else width, self.length)
        self.rows = self._split(rows)

    def _split(self, x):
        return x.reshape(self.runs, self.length, *x.shape[1:])

    def _take(self, x, start, width):
        piece = jax.lax.dynamic_slice_in_dim(x, start, width, 1)
        return piece.reshape(self.runs * width, *x.shape[2:])

    def _fetch(self, start, width):
        # Behind the barrier the rows are fetched once, and not again for each use.
        return jax.lax.optimization_barrier(self._take(self.rows, start, width))

    def _starts(self):
        full = self.length // self.width
        return jnp.arange(full) * self.width, full * self.width, self.length % self.width

    def map(self, f: Callable) -> jax.Array:
        """Maps ``f``, from rows ``[m, d]`` to ``[m]``, over all strips."""
        starts, last, rest = self._starts()
        out = jax.lax.map(lambda i: f(self._fetch(i, self.width)).reshape(self.runs, self.width), starts)
        out = jnp.moveaxis(out, 0, 1).reshape(self.runs, -1)
        if rest:
            out = jnp.concatenate([out, f(self._fetch(last, rest)).reshape(self.runs, rest)], axis=1)
        return out.reshape(-1)

    def accumulate(self, f: Callable, sums, weights: jax.Array):
        """Folds ``f(sums, rows, weights)``, which returns new sums and rows, over all strips."""
        starts, last, rest = self._starts()
        weights = self._split(weights)
        out = jnp.zeros_like(self.rows)

        def one(carry, start, width):
            sums, out = carry
            sums, rows = f(sums, self._fetch(start, width), self._take(weights, start, width))
            return sums, jax.lax.dynamic_update_slice_in_dim(out, rows.reshape(self.runs, width, -1), start, 1)

        carry = jax.lax.fori_loop(0, len(starts), lambda i, c: one(c, starts[i], self.width), (sums, out))
        sums, out = one(carry, last, rest) if rest else carry
        return sums, out.reshape(-1, out.shape[-1])
