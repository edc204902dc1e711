"""The adapted weight itself, where it is small and a CPU makes it: norms are taken from it, and layers multiply by it.

A CPU's compiler writes the product ``a b`` out whatever becomes of it.  So a layer does best to multiply its inputs by
``W + s a b``: that is the product that it makes anyway, and the low-rank branch costs nothing forwards.
"""

import jax
import jax.numpy as jnp

from subspace_jax.kernels._shards import vary_alike

_MOST_BYTES = 16 << 20  # of the weight
_PART_BYTES = 8 << 20  # of the adapted weight that are there at a time
_MOST_ROWS = 8192  # of squares that are added one by one


def is_small(w, dtype) -> bool:
    """Whether an adapted weight, in the type of computation, is small enough for this."""
    return w.size * jnp.dtype(dtype).itemsize <= _MOST_BYTES and w.shape[-2] <= _MOST_ROWS


def adapted(w, a, b, scale):
    """``W + s a b`` in the type of ``scale``."""
    a, b = a.astype(scale.dtype), b.astype(scale.dtype)
    return w.astype(scale.dtype) + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def squares(v):
    """Squared norms ``[..., out]`` of the columns.

    One row at a time, in a loop into which the compiler fuses nothing of what comes before.  So they round alike
    wherever they are made, and the length with which a magnitude begins is the very norm that the layer divides by.
    """
    total, _ = vary_alike(jnp.zeros((*v.shape[:-2], v.shape[-1]), v.dtype), v)
    return jax.lax.scan(lambda total, row: (total + jnp.square(row), None), total, jnp.moveaxis(v, -2, 0))[0]


def in_parts(f, w, a, b, scale):
    """Calls ``f`` with some columns of the adapted weight at a time; its results have these columns last."""
    columns = w.shape[-1]
    wanted = max(1, -(-w.size * scale.dtype.itemsize // _PART_BYTES))
    parts = min(n for n in range(wanted, columns + 1) if columns % n == 0)
    if parts == 1:
        return f(adapted(w, a, b, scale))
    size = columns // parts

    def part(i):
        own, out = (jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=-1) for x in (w, b))
        return f(adapted(own, a, out, scale))

    found = jax.lax.map(part, jnp.arange(parts))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], columns), found)
