"""Factorizations of stacks of matrices."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def of_each(factorize: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Returns ``factorize(x)`` for a stack of matrices, on CPUs computed one after the other.

    Since JAX 0.10 a factorization of a stack on a CPU waits for other threads of the pool that it runs in: as many at a
    time as the pool has threads, two on a machine of two cores, wait for ever.  That of one matrix waits for none.

    Args:
      factorize: Takes ``[..., m, n]``; defined at the top of a module, for it is a key of compiled code.
      x: ``[..., m, n]``.  Where a leading axis is explicitly sharded, the stack stays one.
    """
    if x.ndim == 2 or any(axis is not None for axis in jax.typeof(x).sharding.spec[:-2]):
        return factorize(x)
    return _of_each(factorize, x)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _of_each(factorize, x):
    return jax.lax.platform_dependent(x, cpu=functools.partial(_one_by_one, factorize), default=factorize)


def _one_by_one(factorize, x):
    return factorize(x) if x.ndim == 2 else jax.lax.map(functools.partial(_one_by_one, factorize), x)
