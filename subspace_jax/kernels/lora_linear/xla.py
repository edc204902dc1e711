"""The matmul with a weight and its low-rank update: two matmuls, or one joined contraction.

Joined, ``[x, u] [w; b]`` with ``u = s x a``: XLA for TPUs reads the concatenated operands in place and writes the
result once.  Other compilers would copy the weight; and along a sharded contracted axis the partitioner would move it.
"""

import jax
import jax.numpy as jnp


def apart(x, w, a, b, scale):
    """Returns ``x w + s (x a) b`` as two matmuls."""
    inner = low_rank(x, a, scale)
    y = dot(x, w, -1, 0) + dot(inner, b, -1, 0)
    return y.astype(x.dtype)


def joined(x, w, a, b, scale):
    """Returns the same as one matmul over in + r."""
    inner = low_rank(x, a, scale)
    return dot(jnp.concatenate([x, inner], axis=-1), jnp.concatenate([w, b], axis=0), -1, 0).astype(x.dtype)


def apart_back(d, w, a, b, scale):
    """Returns ``d w^T + s (d b^T) a^T`` as two matmuls."""
    inner = low_rank(d, b.mT, scale)
    return (dot(d, w, -1, 1) + dot(inner, a, -1, 1)).astype(d.dtype)


def joined_back(d, w, a, b, scale):
    """Returns the same as one matmul over out + r."""
    inner = low_rank(d, b.mT, scale)
    return dot(jnp.concatenate([d, inner], axis=-1), jnp.concatenate([w, a], axis=1), -1, 1).astype(d.dtype)


def factor_gradients(x, a, b, d, scale):
    """Returns ``s x^T (d b^T)`` and ``s (x a)^T d``."""
    da = over_rows(x, low_rank(d, b.mT, scale))
    db = over_rows(low_rank(x, a, scale), d)
    return da, db


def over_rows(x, y):
    """Returns ``x^T y``, summed over all axes but the last."""
    every = tuple(range(x.ndim - 1))
    return _dot_general(x, y, (every, every)).astype(x.dtype)


def low_rank(x, a, scale):
    """Returns ``s x a`` in the dtype of ``x``, scaled before rounding."""
    inner = dot(x, a, -1, 0)
    return (scale.astype(inner.dtype) * inner).astype(x.dtype)


def dot(x, y, left, right):
    """Returns a matmul, in float32 for 16-bit types."""
    return _dot_general(x, y, ((left % x.ndim,), (right,)))


def _dot_general(x, y, contracted):
    if x.dtype.itemsize == 2:
        return jax.lax.dot_general(x, y, (contracted, ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.dot_general(x, y, (contracted, ((), ())), precision=jax.lax.Precision.HIGHEST)
