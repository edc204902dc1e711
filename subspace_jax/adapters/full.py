"""A weight that is trained as a whole, beside adapters of others."""

from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Full:
    """Trains a copy of a parameter as a whole: a fresh head, say, or biases.

    PEFT calls this ``modules_to_save``.  Of all settings this is the one that may name any floating-point parameter.
    """

    keeps_base = True

    def start(self, key: jax.Array, w: jax.Array, table: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The copy; the frozen part stays."""
        del key, table
        return w, {"full": w}

    def bind(self, base: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        """The copy in the place of the weight."""
        del base
        return arrays["full"]

    def axes(self, names: P) -> tuple[P, dict[str, P]]:
        """Logical axes of the frozen part and of the copy, from those of the weight."""
        return names, {"full": names}

    def unmerge(self, merged: jax.Array, arrays: dict[str, jax.Array], kept: jax.Array) -> jax.Array:
        """The weight as it was."""
        del merged, arrays
        return kept
