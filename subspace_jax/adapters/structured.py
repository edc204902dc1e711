"""The base class of structured weights: pytrees that replace an array in a parameter tree."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P


class StructuredWeight:
    """A weight that is stored as several arrays; subclasses are registered dataclasses.

    Models apply it through the methods that :func:`subspace_jax.nn.linear`, :func:`subspace_jax.nn.embed`,
    :func:`subspace_jax.nn.unembed` and :func:`subspace_jax.nn.conv` look for: ``linear``, ``lookup``, ``scores`` and
    ``conv``, each only where the weight has that use.
    """

    def dense(self) -> jax.Array:
        """Returns the weight as one array."""
        raise NotImplementedError(f"{type(self).__name__}.dense")

    @property
    def names(self) -> Any:
        """Returns the logical axes of the weight in a tree of axes; None by default."""
        return None


def is_structured(x: Any) -> bool:
    """Whether a node of a tree is a structured weight; for ``is_leaf`` of :func:`jax.tree.map`."""
    return isinstance(x, StructuredWeight)


def as_dense(w: jax.Array | StructuredWeight) -> jax.Array:
    """Returns a weight as one array."""
    return w.dense() if is_structured(w) else w


def axes_of(base: Any) -> P | None:
    """Returns the logical axes of a frozen weight in a tree of axes; None in a tree of arrays."""
    names = base.names if is_structured(base) else base
    return names if isinstance(names, P) else None
