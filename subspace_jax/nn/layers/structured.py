"""The base class of structured weights: pytrees that replace an array in a parameter tree."""

from typing import Any

import jax


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
