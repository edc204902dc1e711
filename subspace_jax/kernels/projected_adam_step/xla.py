"""Reference: one pass where XLA fuses it, and strips of the moments on GPUs.

XLA fuses the moments into the first matmul and the update of W into the second.  On GPUs a matmul is a library call
that writes its result, so that the step runs in strips: a strip of R, N and the update is written at a time.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.kernels.projected_adam_step.arguments import AdamArrays

# Float32 bytes of a strip of the update, unless strips would have fewer than _RUN columns or rows per shard.
_STRIP_BYTES = 1 << 25
_SHARDS = 32
_RUN = 32

# Matmuls of P [m, r] and G [m, n] with N [r, n], or of P [n, r] and G [m, n] with N [m, r].
_PROJECT = {"left": "...mr,...mn->...rn", "right": "...nr,...mn->...mr"}
_BACK = {"left": "...mr,...rn->...mn", "right": "...nr,...mr->...mn"}


def step(arrays: AdamArrays, *, side: str, block: int | None, axes: tuple[str, ...]):
    """Returns new ``w, mu, nu``; ``P^T G`` is summed over mesh ``axes``."""

    def at_once(*args):
        return _at_once(AdamArrays(*args), side, axes)

    @jax.custom_jvp
    def strips(*args):
        return _in_strips(AdamArrays(*args), side, block, axes)

    # A loop that is differentiated stores every array that it replaces.
    strips.defjvp(lambda args, tangents: jax.jvp(at_once, args, tangents))

    # An explicit block holds on every platform.
    if block is not None:
        return strips(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=strips, rocm=strips, default=at_once)


def product(equation: str, basis: jax.Array, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns a matmul in bfloat16 if ``dtype``, that of the large matrix, is; otherwise in full precision."""
    if dtype == jnp.bfloat16:
        basis, x = basis.astype(dtype), x.astype(dtype)
        return jnp.einsum(equation, basis, x, preferred_element_type=jnp.float32)
    work = jnp.promote_types(basis.dtype, dtype)
    basis, x = basis.astype(work), x.astype(work)
    return jnp.einsum(equation, basis, x, precision=jax.lax.Precision.HIGHEST)


def _at_once(arrays: AdamArrays, side: str, axes: tuple[str, ...]):
    w, grad, basis, mu, nu, scalars = arrays
    rate1, rate2, eps, size, keep = (scalars[i] for i in range(5))
    r = product(_PROJECT[side], basis, grad, grad.dtype).astype(mu.dtype)
    r = jax.lax.psum(r, axes) if axes else r
    mu = (1 - rate1) * mu + rate1 * r
    nu = (1 - rate2) * nu + rate2 * jnp.square(r)
    update = product(_BACK[side], basis, size * mu / (jnp.sqrt(nu) + eps), w.dtype)
    new = (w.astype(update.dtype) - update) * keep.astype(update.dtype)
    return new.astype(w.dtype), mu, nu


def _in_strips(arrays: AdamArrays, side: str, block: int | None, axes: tuple[str, ...]):
    """Runs the step on a strip of columns, or rows for the right side, at a time.

    If these are sharded over Auto mesh axes, each strip needs a part of every shard for the loop to need no
    collective: they are divided into up to _SHARDS runs, and a strip takes a piece of each run.
    """
    w, axis = arrays.w, -1 if side == "left" else -2
    size, other = w.shape[axis], math.prod(w.shape) // w.shape[axis]
    runs = math.gcd(size, _SHARDS)
    length = size // runs
    strip = block or max(_STRIP_BYTES // (4 * other), runs * _RUN)
    strip = max(1, min(strip // runs, length))
    if strip == length:
        return _at_once(arrays, side, axes)

    def split(x):
        at = x.ndim + axis
        return x.reshape(*x.shape[:at], runs, length, *x.shape[at + 1 :])

    def join(x):
        at = x.ndim + axis
        return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])

    def take(x, start, width):
        return join(jax.lax.dynamic_slice_in_dim(x, start, width, axis))

    def put(x, piece, start, width):
        at = piece.ndim + axis
        piece = piece.reshape(*piece.shape[:at], runs, width, *piece.shape[at + 1 :])
        return jax.lax.dynamic_update_slice_in_dim(x, piece, start, axis)

    grad = split(arrays.grad)

    def advance(carry, start, width):
        w, mu, nu = (take(x, start, width) for x in carry)
        part = arrays._replace(w=w, grad=take(grad, start, width), mu=mu, nu=nu)
        return tuple(put(x, piece, start, width) for x, piece in zip(carry, _at_once(part, side, axes), strict=True))

    carry, count = tuple(map(split, (w, arrays.mu, arrays.nu))), length // strip
    carry = jax.lax.fori_loop(0, count, lambda i, carry: advance(carry, i * strip, strip), carry)
    if rest := length % strip:
        carry = advance(carry, count * strip, rest)
    return tuple(map(join, carry))
