"""Gradient probes: leaves beside the factors of an adapter that receive statistics of the weight's gradient."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg
from subspace_jax.adapters.rules import adapters_of, insert

PyTree = Any

PROBES = ("row_energy", "column_energy")


def add_gradient_probes(trainable: PyTree) -> PyTree:
    """Adds probes to all adapters with factors ``a`` and ``b``, except those of embedding tables and convolutions.

    :func:`subspace_jax.adapters.bind` puts them into the weights.  In a gradient of the loss, their leaves are the sums
    of squares of the gradient of the full weight, by rows and by columns: the statistic "full" of
    :func:`subspace_jax.optim.adaprelora`.  The cost is a matmul of the size of the weight in the backward pass; see
    :func:`subspace_jax.kernels.energy_probes`.  The gradient through a norm that is not detached is not included.

    Args:
      trainable: Tree of :func:`subspace_jax.adapters.init` or :func:`subspace_jax.adapters.prepare`.

    Returns:
      A nested dict with ``row_energy [..., in]`` and ``column_energy [..., out]`` beside ``a`` and ``b``, zeros.

    Examples:
      >>> import jax
      >>> from subspace_jax import adapters
      >>> settings = {"q": adapters.LoRA(2, 4.0)}
      >>> trainable = adapters.init(jax.random.key(0), {"q": {"kernel": jax.numpy.ones((8, 4))}}, settings)
      >>> sorted(adapters.add_gradient_probes(trainable)["q"]["kernel"])
      ['a', 'b', 'column_energy', 'row_energy']
    """
    out: dict[str, Any] = {}
    for path, arrays in adapters_of(trainable).items():
        factors = {"a", "b"} <= arrays.keys() and arrays["a"].ndim == arrays["b"].ndim  # false for a convolution
        if factors and path.split("/")[-1] != "embedding":
            a, b = arrays["a"], arrays["b"]
            # Computed from the factors, so that they have the same sharding.
            dtype = linalg.working_dtype(a, b)
            probes = (jnp.zeros_like(jnp.max(a, axis=-1), dtype), jnp.zeros_like(jnp.max(b, axis=-2), dtype))
            arrays = {**arrays, **dict(zip(PROBES, probes, strict=True))}
        insert(out, path, arrays)
    return out


def drop_gradient_probes(trainable: PyTree) -> PyTree:
    """Removes the probes, for other optimizers, :func:`subspace_jax.adapters.count`, or an export.

    Args:
      trainable: A trainable tree, with or without probes.

    Returns:
      A nested dict without them.
    """
    out: dict[str, Any] = {}
    for path, arrays in adapters_of(trainable).items():
        insert(out, path, {name: x for name, x in arrays.items() if name not in PROBES})
    return out


def probes_in(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a structured weight that hold probes."""
    return {name: arrays[name] for name in PROBES if name in arrays}


def probe_axes(names: P) -> dict[str, P]:
    """Returns the logical axes of probes, from those of the weight."""
    *lead, rows, columns = names
    return dict(zip(PROBES, (P(*lead, rows), P(*lead, columns)), strict=True))
