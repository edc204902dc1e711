"""The step as XLA compiles it: whole on TPUs and CPUs, a strip of the moments at a time on GPUs.

The compilers for TPUs and CPUs put the moments at the end of the first product, and N and the subtraction around the
second one.  On GPUs a product is a call of a library that writes its result, so that there the step is made in strips:
what is written of R, N and the update is a strip of each.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Float32 bytes of a strip of the update, unless strips would have fewer than _RUN columns or rows on each shard.
_STRIP_BYTES = 1 << 25
_SHARDS = 32
_RUN = 32

# Products of P [m, r] and G [m, n] with N [r, n], or of P [n, r] and G [m, n] with N [m, r].
_PROJECT = {"left": "...mr,...mn->...rn", "right": "...nr,...mn->...mr"}
_BACK = {"left": "...mr,...rn->...mn", "right": "...nr,...mr->...mn"}


def step(w, grad, basis, mu, nu, scalars, *, side, block, axes):
    """Returns new ``w, mu, nu``; ``axes`` names mesh axes over which P^T G is summed."""

    def whole(*args):
        return _whole(*args, side=side, axes=axes)

    @jax.custom_jvp
    def strips(*args):
        return _in_strips(*args, side=side, block=block, axes=axes)

    # A loop that is differentiated keeps what it replaces, each time.
    strips.defjvp(lambda args, tangents: jax.jvp(whole, args, tangents))

    # A block that was asked for is had on every platform.
    if block is not None:
        return strips(w, grad, basis, mu, nu, scalars)
    return jax.lax.platform_dependent(w, grad, basis, mu, nu, scalars, cuda=strips, rocm=strips, default=whole)


def product(equation: str, basis: jax.Array, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A product in bfloat16 where the large matrix that it belongs to is, and in full precision otherwise."""
    if dtype == jnp.bfloat16:
        basis, x = basis.astype(dtype), x.astype(dtype)
        return jnp.einsum(equation, basis, x, preferred_element_type=jnp.float32)
    work = jnp.promote_types(basis.dtype, dtype)
    basis, x = basis.astype(work), x.astype(work)
    return jnp.einsum(equation, basis, x, precision=jax.lax.Precision.HIGHEST)


def _whole(w, grad, basis, mu, nu, scalars, *, side, axes):
    rate1, rate2, eps, size, keep = (scalars[i] for i in range(5))
    r = product(_PROJECT[side], basis, grad, grad.dtype).astype(mu.dtype)
    r = jax.lax.psum(r, axes) if axes else r
    mu = (1 - rate1) * mu + rate1 * r
    nu = (1 - rate2) * nu + rate2 * jnp.square(r)
    update = product(_BACK[side], basis, size * mu / (jnp.sqrt(nu) + eps), w.dtype)
    new = (w.astype(update.dtype) - update) * keep.astype(update.dtype)
    return new.astype(w.dtype), mu, nu


def _in_strips(w, grad, basis, mu, nu, scalars, *, side, block, axes):
    """:func:`_whole` for a strip of columns, or rows for the right side, at a time.

    Where these are sharded over Auto mesh axes, each strip must have a share of every shard for the loop to need no
    collective: they are split into _SHARDS runs, or as many of them as go, and a strip takes a piece of each run.
    """
    axis = -1 if side == "left" else -2
    size, other = w.shape[axis], math.prod(w.shape) // w.shape[axis]
    runs = math.gcd(size, _SHARDS)
    length = size // runs
    strip = block or max(_STRIP_BYTES // (4 * other), runs * _RUN)
    strip = max(1, min(strip // runs, length))
    if strip == length:
        return _whole(w, grad, basis, mu, nu, scalars, side=side, axes=axes)

    def split(x):
        at = x.ndim + axis
        return x.reshape(*x.shape[:at], runs, length, *x.shape[at + 1 :])

    def join(x):
        at = x.ndim + axis
        return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])

    def take(x, start, width, dtype):
        return _from_bits(join(jax.lax.dynamic_slice_in_dim(x, start, width, axis)), dtype)

    def put(x, piece, start, width):
        at, piece = piece.ndim + axis, _to_bits(piece)
        piece = piece.reshape(*piece.shape[:at], runs, width, *piece.shape[at + 1 :])
        return jax.lax.dynamic_update_slice_in_dim(x, piece, start, axis)

    dtypes = w.dtype, mu.dtype, nu.dtype

    def advance(carry, start, width):
        # Tied to the start, the conversion to integers isn't made for all of G before the loop.
        g, at = jax.lax.optimization_barrier((grad, start))
        g = take(split(_to_bits(g)), at, width, grad.dtype)
        w, mu, nu = (take(x, start, width, dtype) for x, dtype in zip(carry, dtypes, strict=True))
        new = _whole(w, g, basis, mu, nu, scalars, side=side, axes=axes)
        return tuple(put(x, piece, start, width) for x, piece in zip(carry, new, strict=True))

    carry, count = tuple(split(_to_bits(x)) for x in (w, mu, nu)), length // strip
    carry = jax.lax.fori_loop(0, count, lambda i, carry: advance(carry, i * strip, strip), carry)
    if rest := length % strip:
        carry = advance(carry, count * strip, rest)
    return tuple(_from_bits(join(x), dtype) for x, dtype in zip(carry, dtypes, strict=True))


def _to_bits(x):
    """Bfloat16 as integers: a CPU would convert whole arrays to float32 and back to slice or update them."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x
