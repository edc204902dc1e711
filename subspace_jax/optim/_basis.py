"""Orthonormal bases of the leaves of a tree, and projection to and from them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import linalg

PyTree = Any


class Basis(NamedTuple):
    """Orthonormal columns for one leaf ``[..., m, n]``.

    Attributes:
      left: ``[..., m, r]``, None where the leaf isn't projected from the left.
      right: ``[..., n, r]``, None where it isn't projected from the right.
    """

    left: jax.Array | None = None
    right: jax.Array | None = None


def present(basis: Basis) -> Basis:
    """The basis with None for placeholders."""
    return Basis(*(x if x is not None and x.ndim > 1 else None for x in basis))


def bases_of(sides: Basis) -> PyTree:
    """Tree of one :class:`Basis` for each leaf, from the two trees of arrays that a state holds."""
    return jax.tree.map(lambda *pair: present(Basis(*pair)), *sides)


def matmul(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Einsum in bfloat16 with float32 accumulation where an operand is bfloat16, else in full precision."""
    if jnp.bfloat16 in (x.dtype, y.dtype):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
    work = linalg.working_dtype(x, y)
    return jnp.einsum(equation, x.astype(work), y.astype(work), precision=jax.lax.Precision.HIGHEST)


def project(basis: Basis, g: jax.Array) -> jax.Array:
    """``P^T G``, ``G Q`` or ``P^T G Q``."""
    if basis.left is not None:
        g = matmul("...mr,...mn->...rn", basis.left, g)
    return g if basis.right is None else matmul("...mn,...nr->...mr", g, basis.right)


def project_back(basis: Basis, low: jax.Array) -> jax.Array:
    """``P N``, ``N Q^T`` or ``P N Q^T``."""
    if basis.left is not None:
        low = matmul("...mr,...rn->...mn", basis.left, low)
    return low if basis.right is None else matmul("...mr,...nr->...mn", low, basis.right)


def rotate(old: Basis, new: Basis, moment: jax.Array, *, second: bool) -> jax.Array:
    """A moment in the coordinates of a new basis; second moments by the squared cosines, which keeps them positive."""
    if old.left is not None:
        rotation = linalg.gram(new.left, old.left)
        moment = linalg.times(jnp.square(rotation) if second else rotation, moment)
    if old.right is not None:
        rotation = linalg.gram(old.right, new.right)
        moment = linalg.times(moment, jnp.square(rotation) if second else rotation)
    return moment
