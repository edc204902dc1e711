"""Versine and sine of the square root of symmetric matrices, by matmuls alone.

Eigenvalue problems of many small matrices are slow, above all on accelerators.  This is the scaling and doubling of
Higham, "Functions of Matrices" (SIAM, 2008), chapter 12: Taylor polynomials at ``M / 4^q``, then double angles.
"""

import functools
import math

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_square
from subspace_jax.linalg.products import eye_like, times
from subspace_jax.linalg.spectral import sinc_sqrt, spectral, versine_sqrt

# At norm 1 the remainder of degree d is below 1 / (2 d + 3)!, which is less than half a rounding.
_DEGREE = {4: 4, 8: 8}
_MAX_DOUBLINGS = 6


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def versine_sinc_sqrt(m: jax.Array, bounded: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns ``I - cos(sqrt(M))`` and ``sin(sqrt(M)) / sqrt(M)`` of symmetric matrices without negative eigenvalues.

    The first is called versine, and is accurate for small M.  With ``theta^2`` the norm of M, errors are a few times
    ``1 + theta^2`` roundings; eigenvalues that are negative by rounding are valid.  If the norm of any matrix is above
    4096, or not finite, :func:`spectral` computes all of them; under ``vmap`` it always runs.  The number of doublings
    depends on the largest norm: none up to norm 1.  Derivatives are those of :func:`spectral`, by eigenvalues.

    Args:
      m: ``[..., k, k]``, symmetric, float32 or float64.
      bounded: Whether norms are known to be at most 4096, so that the program has no eigenvalue problem: the
        partitioner cannot shard one, and allocates all matrices on each device.

    Returns:
      Two symmetric matrices ``[..., k, k]``.

    Raises:
      ValueError: ``m`` is not square.
      TypeError: ``m`` is neither float32 nor float64.

    Examples:
      >>> import jax.numpy as jnp
      >>> from subspace_jax import linalg
      >>> versine, sinc = linalg.versine_sinc_sqrt(jnp.diag(jnp.array([0.0, jnp.pi**2])))
      >>> [round(float(x), 4) + 0 for x in (versine[0, 0], versine[1, 1], sinc[0, 0], sinc[1, 1])]
      [0.0, 2.0, 1.0, 0.0]
    """
    check_square("m", m)
    norm = jnp.max(jnp.sum(jnp.abs(m), axis=-1), axis=-1)
    if bounded:
        return _by_doubling(m, norm)
    served = jnp.all(norm <= 4.0**_MAX_DOUBLINGS)
    return jax.lax.cond(served, _by_doubling, lambda m, _: _by_eigenvalues(m), m, norm)


@versine_sinc_sqrt.defjvp
def _jvp(bounded: bool, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple:
    del bounded
    return jax.jvp(_by_eigenvalues, primals, tangents)


def _by_eigenvalues(m: jax.Array) -> tuple[jax.Array, ...]:
    return spectral(lambda x: (x * versine_sqrt(x), sinc_sqrt(x)), m)


def _by_doubling(m: jax.Array, norm: jax.Array) -> tuple[jax.Array, ...]:
    doublings = jnp.ceil(jnp.log2(jnp.maximum(norm, 1.0)) / 2)
    wanted = doublings[..., None, None]
    m = m * jnp.exp2(-2 * wanted)
    even, sinc = _series(m)
    eye = eye_like(m)

    def double(i, state):
        versine, sinc = state
        due = i.astype(m.dtype) < wanted
        doubled = 4 * versine - 2 * times(versine, versine)
        return jnp.where(due, doubled, versine), jnp.where(due, times(sinc, eye - versine), sinc)

    most = jnp.max(doublings, initial=0.0).astype(jnp.int32)
    versine, sinc = jax.lax.fori_loop(0, most, double, (times(m, even), sinc))
    return versine, sinc


def _series(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(I - cos(sqrt(M))) / M`` and ``sin(sqrt(M)) / sqrt(M)``, in powers of ``M^2`` to save matmuls."""
    degree, square, eye = _DEGREE[m.dtype.itemsize], times(m, m), eye_like(m)

    def series(first):
        terms = [(-1) ** i / math.factorial(2 * i + first) for i in range(degree + 1)]
        total = terms[degree] * square + terms[degree - 1] * m + terms[degree - 2] * eye
        for i in range(degree - 4, -1, -2):
            total = times(square, total) + terms[i + 1] * m + terms[i] * eye
        return total

    return series(2), series(1)
