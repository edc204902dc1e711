"""Arrays of optimizer states: placeholders, and sharding under Explicit mesh axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from subspace_jax import linalg

PyTree = Any


def automatic(f: Callable, args: tuple, specs: Callable[[], PyTree]) -> PyTree:
    """Calls ``f(*args)``; under Explicit mesh axes the compiler shards what is inside, and results get ``specs()``."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return jax.sharding.auto_axes(f, out_sharding=specs())(*args) if explicit else f(*args)


def spec_of(x: PyTree) -> PyTree:
    """PartitionSpecs of arrays, under Explicit axes."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, x)


def absent(x: jax.Array) -> jax.Array:
    """Placeholder ``[1]`` of a state that keeps nothing for a leaf ``x``, as in ``optax.adafactor``.

    ``flax.nnx.Optimizer`` and ``optax.tree.map_params`` expect an array for each leaf.
    """
    return jnp.zeros(1, linalg.working_dtype(x))
