"""Matmuls of activations with weights and their derivatives, on sharded arrays."""

import functools

import jax

from subspace_jax.kernels._shards import leading_axes, over_shards, sharded_like, vary_alike


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns ``x w`` for ``x [..., in]`` and ``w [in, out]``, in the dtype of ``x``.

    16-bit types take one pass of the matrix unit; float32 keeps full precision.  Over Explicit mesh axes, where JAX
    asks for the sharding of a sum over a sharded axis, such sums are reduced over the devices, in the derivatives too.
    """
    return _product(*vary_alike(x, w.astype(x.dtype)))


@jax.custom_vjp
def _product(x, w):
    rows = leading_axes(x, 1)
    return over_shards(_contract(((-1,), (0,))), f"{rows} i, i o -> {rows} o")(x, w)


def _forward(x, w):
    return _product(x, w), (x, w)


def _backward(kept, d):
    x, w = kept
    rows, every = leading_axes(x, 1), tuple(range(x.ndim - 1))
    dx = over_shards(_contract(((-1,), (1,))), f"{rows} o, i o -> {rows} i")(d, w)
    dw = over_shards(_contract((every, every)), f"{rows} i, {rows} o -> i o")(x, d)
    return sharded_like(dx, x), sharded_like(dw, w)


_product.defvjp(_forward, _backward)


def _contract(axes):
    return functools.partial(_dot, axes=axes)


def _dot(x, y, *, axes):
    left, right = (tuple(axis % z.ndim for axis in side) for side, z in zip(axes, (x, y), strict=True))
    precision = None if x.dtype.itemsize == 2 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(x, y, ((left, right), ((), ())), precision=precision)
