"""Matrix exponential by matmuls alone, and the action of the exponential of an operator.

Both are truncated Taylor series with a remainder below the rounding of the dtype, exact to working precision.  They
need no factorization and no solve, which suits accelerators, and are differentiable.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_square
from subspace_jax.linalg.products import eye_like, times

PyTree = Any

# The remainder of degree d at norm x is about x^(d + 1) / (d + 1)!.
_EXPM_NORM, _EXPM_DEGREE = 1.5, {4: 12, 8: 20}
_MAX_SQUARINGS = 10
_ACTION_NORM, _ACTION_DEGREE = 1.0, {4: 10, 8: 18}


def expm(m: jax.Array) -> jax.Array:
    """Returns the exponential of square matrices, by a scaled Taylor polynomial (Paterson-Stockmeyer) and squaring.

    The error relative to the result is about the machine precision times the norm for normal matrices, as for other
    methods of scaling and squaring (Higham, "Functions of Matrices", chapter 10).

    Args:
      m: ``[..., k, k]``, float32 or float64.

    Returns:
      ``[..., k, k]``; NaN if the 1-norm is above 1536, which needs more than ten squarings.

    Raises:
      ValueError: ``m`` is not square.
      TypeError: ``m`` is neither float32 nor float64.
    """
    check_square("m", m)
    norm = jax.lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(m), axis=-2), axis=-1))
    needed = jnp.ceil(jnp.log2(jnp.maximum(norm / _EXPM_NORM, 1.0)))
    squarings = jnp.minimum(needed, _MAX_SQUARINGS)[..., None, None]
    power = _taylor(m * jnp.exp2(-squarings), _EXPM_DEGREE[m.dtype.itemsize])

    def square(power, i):
        return jnp.where(i < squarings, times(power, power), power), None

    power = jax.lax.scan(square, power, jnp.arange(_MAX_SQUARINGS, dtype=m.dtype))[0]
    return jnp.where((needed <= _MAX_SQUARINGS)[..., None, None], power, jnp.nan)


def expm_action(operator: Callable[[PyTree], PyTree], x: PyTree, norm: jax.Array, max_steps: int = 32) -> PyTree:
    """Applies the exponential of a linear operator to ``x`` without forming a matrix.

    The interval is divided into steps of norm at most 1, each a Taylor series (Al-Mohy and Higham, SIAM J. Sci. Comput.
    33, 2011); steps beyond the number that the norm requires are skipped.

    Args:
      operator: Linear map of a pytree of arrays to one of the same shapes and dtypes.
      x: The pytree, all leaves float32 or all float64.
      norm: Upper bound of the operator norm, a scalar; the largest of a batch.
      max_steps: Maximum number of steps, static.

    Returns:
      Like ``x``; NaN if ``norm`` is above ``max_steps``.
    """
    degree = _ACTION_DEGREE[jax.tree.leaves(x)[0].dtype.itemsize]
    norm = jax.lax.stop_gradient(norm)
    needed = jnp.ceil(jnp.maximum(norm / _ACTION_NORM, 1.0))

    def advance(x):
        def add(i, carry):
            term, total = carry
            term = jax.tree.map(lambda y: y / (i * needed), operator(term))
            return term, jax.tree.map(jnp.add, total, term)

        def body(carry, i):
            return add(i, carry), None

        return jax.lax.scan(body, (x, x), jnp.arange(1, degree + 1, dtype=norm.dtype))[0][1]

    def step(x, i):
        return jax.lax.cond(i < needed, advance, lambda x: x, x), None

    out = jax.lax.scan(step, x, jnp.arange(max_steps, dtype=norm.dtype))[0]
    return jax.tree.map(lambda y: jnp.where(needed <= max_steps, y, jnp.nan), out)


def _taylor(m: jax.Array, degree: int) -> jax.Array:
    """Returns the sum of ``m^i / i!`` up to a degree that is a multiple of 4, with ``2 + degree / 4`` matmuls."""
    square = times(m, m)
    powers = (eye_like(m), m, square, times(square, m))
    fourth = times(square, square)
    total = fourth / math.factorial(degree)
    for low in range(degree - 4, -1, -4):
        total = total + sum(p / math.factorial(low + i) for i, p in enumerate(powers))
        total = times(fourth, total) if low else total
    return total
