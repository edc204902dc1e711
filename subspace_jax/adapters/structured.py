"""Structured weights in a parameter tree, each in place of an array."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from subspace_jax.nn.layers.structured import StructuredWeight


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
