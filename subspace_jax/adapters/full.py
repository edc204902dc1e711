"""A parameter that trains itself, beside adapters of others."""

from dataclasses import dataclass
from typing import ClassVar

import jax
from jax.sharding import PartitionSpec as P

from subspace_jax.adapters.config import AdapterConfig, Arrays


@dataclass(frozen=True)
class Full(AdapterConfig):
    """Trains a copy of a parameter: a new head, or biases.

    The counterpart of PEFT's ``modules_to_save``.  Any floating-point parameter may be named, vectors included.
    """

    labels: ClassVar = {"full": "full"}
    trains_weight = True
    quantizable_base = False
    rank = None

    def admits(self, path: str, ndim: int) -> bool:
        """Admits every parameter."""
        del path, ndim
        return True

    def initialize(
        self, key: jax.Array, w: jax.Array, *, table: bool = False, gradient: jax.Array | None = None
    ) -> tuple[jax.Array, Arrays]:
        """Returns the parameter, frozen and as the array that trains."""
        del key, table, gradient
        return w, {"full": w}

    def bind(self, base: jax.Array, arrays: Arrays, key: jax.Array | None = None) -> jax.Array:
        """Returns the trained copy."""
        del base, key
        return arrays["full"]

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Returns the axes of the parameter, twice."""
        return names, {"full": names}

    def merge_state(self, base: jax.Array, arrays: Arrays) -> jax.Array:
        """Returns the parameter before training."""
        del arrays
        return base

    def unmerge(self, merged: jax.Array, arrays: Arrays, kept: jax.Array) -> jax.Array:
        """Returns the parameter before training."""
        del merged, arrays
        if kept is None:
            raise TypeError("kept: expected the parameter before training, got None")
        return kept
