"""The adapted weight itself, where it is small and a CPU makes it: norms are taken from it, and layers multiply by it.

A CPU's compiler writes the product ``a b`` out whatever becomes of it.  So a layer does best to multiply its inputs by
``W + s a b``: that is the product that it makes anyway, and the low-rank branch costs nothing forwards.
"""

import jax
import jax.numpy as jnp

from subspace_jax.kernels._shards import vary_alike

_MOST_BYTES = 16 << 20  # larger weights are not there as a whole
_MOST_ROWS = 8192  # of squares that are added one by one


def is_small(w, dtype) -> bool:
    """Whether the adapted weight, in the type of computation, may be there as a whole."""
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
