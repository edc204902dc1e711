"""The Q of QR for columns of any condition, out of narrow products: quick to compile at any width."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_tall
from subspace_jax.linalg.products import eye_like, gram, times

# Columns that are done at once.  Compilers for accelerators unroll wider factorisations, and take long over products
# in full precision: for a TPU a minute for Householder's QR of 512 columns, 20 s for one Gram matrix of 1024.
_BLOCK = 128
# Errors of Gram matrices: with less a block needs no shift, and a pass that starts with less is the last one.
_NEAR, _DONE = 0.9, 0.5
# Each pass divides condition numbers by up to (2 k eps)^(-1/2), 60 and more: rounding errors show after so many.
_STUCK, _PASSES = 6, 16


def orthonormal_columns(x: jax.Array) -> jax.Array:
    """Returns the Q factor of a QR with positive diagonal, for columns that may be linearly dependent.

    Takes shifted Cholesky passes as in :func:`shifted_cholesky_qr3`: two or three, and one more per factor
    ``(2 k eps)^(-1/2)`` in the condition number (64 for ``k = 1024`` in float32).  Columns that are dependent, to
    rounding, are replaced by directions orthogonal to all columns before them.  ``x`` may be zero.

    Passes are a loop, and so are blocks of 128 columns within a pass, by block Gram-Schmidt.  The size of the program
    does not depend on ``k``.  No reverse-mode derivative.

    Args:
      x: ``[..., n, k]`` with ``n >= k``, float32 or float64, finite.

    Returns:
      ``[..., n, k]`` with orthonormal columns; the spectral error of their Gram matrix is some 10 machine precisions.
      NaN where ``x`` is not finite.

    Raises:
      ValueError: ``x`` is wider than tall.
      TypeError: ``x`` is neither float32 nor float64.
    """
    check_tall("x", x)
    k = x.shape[-1]
    # With a norm of at most 1, which passes keep, one shift serves all.
    x = _divided(x, jnp.max(jnp.abs(x), axis=(-2, -1)))
    x = _divided(x, jnp.linalg.norm(x, axis=(-2, -1)))
    blocks = -(-k // _BLOCK)
    if blocks > 1:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * _BLOCK - k)])

    def going(carry):
        _, error, passes = carry
        return (error > _DONE) & (passes < _PASSES)

    def one(carry):
        x, _, passes = carry
        x, error = _pass(jax.lax.cond(passes == _STUCK, lambda x: _shaken(x, k), lambda x: x, x), k)
        return x, jnp.max(error), passes + 1

    return jax.lax.while_loop(going, one, (x, jnp.asarray(jnp.inf, x.dtype), jnp.asarray(0)))[0][..., :k]


def _divided(x, size):
    return x / jnp.where(size > 0, size, 1)[..., None, None]


def _pass(x, k):
    """One pass over ``x [..., n, blocks * width]`` with ``k`` columns; the error before it is ``[...]``."""
    width = min(x.shape[-1], _BLOCK)
    shift = 2 * k * jnp.finfo(x.dtype).eps

    def one(i, carry):
        x, error = carry
        start = i * width
        block = jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)
        products = gram(x, block)
        square = jax.lax.dynamic_slice_in_dim(products, start, width, axis=-2)
        eye = eye_like(square)
        if x.shape[-1] > k:
            # Zero columns behind the last ones count as done.
            square = square + eye * (start + _rows(square) >= k).astype(x.dtype)
        error = error + jnp.sum(jnp.square(square - eye), axis=(-2, -1))
        if x.shape[-1] > width:
            shares = jnp.where(_rows(products) < start, products, 0)
            error = error + 2 * jnp.sum(jnp.square(shares), axis=(-2, -1))
            square = square - gram(shares, shares)
            block = block - times(x, shares)
        near = jnp.linalg.norm(square - eye, axis=(-2, -1), keepdims=True) <= _NEAR
        r = jnp.linalg.cholesky(square + jnp.where(near, 0, shift) * eye).mT
        inverse = jax.lax.linalg.triangular_solve(r, eye, left_side=True, lower=False)
        return jax.lax.dynamic_update_slice_in_dim(x, times(block, inverse), start, axis=-1), error

    start = jnp.zeros(x.shape[:-2], x.dtype)
    if x.shape[-1] == width:
        x, error = one(0, (x, start))
    else:
        x, error = jax.lax.fori_loop(0, x.shape[-1] // width, one, (x, start))
    return x, jnp.sqrt(error)


def _rows(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2)


def _shaken(x, k):
    """``x`` with rounding errors at random, so that no direction stays out of reach."""
    noise = jax.random.normal(jax.random.key(0), (*x.shape[:-1], k), x.dtype)
    return x.at[..., :k].add(jnp.finfo(x.dtype).eps * noise)
