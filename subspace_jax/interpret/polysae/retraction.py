"""Decoder factors with orthonormal columns: the step back onto the manifold after an optimizer's update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax import linalg

PyTree = Any


def qr_positive(u: jax.Array) -> jax.Array:
    """Returns the Q factor of the QR with a positive diagonal.

    By Cholesky factors of Gram matrices (see :func:`subspace_jax.linalg.orthonormal_columns`): where rows are sharded,
    Gram matrices are summed.  Dependent columns, and columns of zeros, are replaced.

    Args:
      u: ``[m, R]`` with ``m >= R``, float32 or float64.

    Raises:
      ValueError: ``u`` is wider than tall.
      TypeError: ``u`` is neither float32 nor float64.
    """
    return linalg.orthonormal_columns(u)


def stiefel_retract(mask: PyTree) -> Callable[[PyTree], PyTree]:
    """Returns a projection of parameters, to be applied after ``optax.apply_updates``.

    The moments of the optimizer are not transported, and the gradient is not projected: with Adam this is projected
    Adam on the Stiefel manifold, and no Riemannian step.

    Args:
      mask: Tree of truth values with the structure of the parameters: those to be replaced by :func:`qr_positive`.
    """
    return lambda params: jax.tree.map(lambda x, chosen: qr_positive(x) if chosen else x, params, mask)


def retract_separate(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Makes the columns of the factors of all orders orthonormal, and where there is room orthogonal to each other.

    Of factors ``U1 [m, R1]``, ``U2 [m, R2]``, ``U3 [m, R3]`` of equal ranks, each is orthogonal to those before it.  Of
    different ranks, ``U1[:, :R3]`` comes first, then both parts of U2, U3, and the rest of U1.

    Args:
      params: Parameters with the factors.

    Returns:
      The parameters with new factors.
    """
    u1, u2, u3 = (params[f"U{order}"] for order in (1, 2, 3))
    second, third = u2.shape[1], u3.shape[1]
    if u1.shape[1] == second == third:
        q1 = qr_positive(u1)
        q2 = qr_positive(_without(u2, q1))
        q3 = qr_positive(_without(u3, q1, q2))
        return {**params, "U1": q1, "U2": q2, "U3": q3}
    q1 = _orthonormal(u1[:, :third])
    q2 = _orthonormal(_without(u2[:, :third], q1))
    new2 = jnp.concatenate([q2, _orthonormal(_without(u2[:, third:], q2))], axis=1)
    q3 = _orthonormal(_without(u3, q1, q2))
    middle = _orthonormal(_without(u1[:, third:second], q1))
    done = jnp.concatenate([q1, middle], axis=1)
    new1 = jnp.concatenate([done, _orthonormal(_without(u1[:, second:], done))], axis=1)
    return {**params, "U1": new1, "U2": new2, "U3": q3}


def _orthonormal(u: jax.Array) -> jax.Array:
    return qr_positive(u) if u.shape[1] else u


def _without(u: jax.Array, *others: jax.Array) -> jax.Array:
    for q in others:
        u = u - linalg.times(q, linalg.gram(q, u))
    return u
