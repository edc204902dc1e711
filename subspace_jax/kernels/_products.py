"""Products of activations with weights, forwards and backwards, wherever the two are sharded."""

import functools

import jax

from subspace_jax.kernels._shards import over_shards, vary_alike


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x w`` for ``x [..., in]`` and ``w [in, out]``, in the dtype of ``x``.

    16-bit types take one pass of the matrix unit; float32 keeps full precision.  Over Explicit mesh axes, where JAX
    would ask how to place sums over a split axis, such sums are made over the devices, in the derivatives too.
    """
    return _product(*vary_alike(x, w.astype(x.dtype)))


@jax.custom_vjp
def _product(x, w):
    rows = _rows(x)
    return over_shards(_contract(((-1,), (0,))), f"{rows} i, i o -> {rows} o")(x, w)


def _forward(x, w):
    return _product(x, w), (x, w)


def _backward(kept, d):
    x, w = kept
    rows, every = _rows(x), tuple(range(x.ndim - 1))
    dx = over_shards(_contract(((-1,), (1,))), f"{rows} o, i o -> {rows} i")(d, w)
    dw = over_shards(_contract((every, every)), f"{rows} i, {rows} o -> i o")(x, d)
    return placed_like(dx, x), placed_like(dw, w)


_product.defvjp(_forward, _backward)


def placed_like(grad: jax.Array, x: jax.Array) -> jax.Array:
    """Splits over Explicit mesh axes what is split in ``x`` and was gathered or summed for the products."""
    wanted = jax.typeof(x).sharding.spec
    return grad if jax.typeof(grad).sharding.spec == wanted else jax.sharding.reshard(grad, wanted)


def _contract(axes):
    return functools.partial(_dot, axes=axes)


def _dot(x, y, *, axes):
    left, right = (tuple(axis % z.ndim for axis in side) for side, z in zip(axes, (x, y), strict=True))
    precision = None if x.dtype.itemsize == 2 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(x, y, ((left, right), ((), ())), precision=precision)


def _rows(x) -> str:
    return " ".join(f"row{i}" for i in range(x.ndim - 1))
