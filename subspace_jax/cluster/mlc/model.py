"""The network of MLC: a trunk and two heads on the sphere, for features and for clusters (arXiv 2301.01805)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from subspace_jax import linalg, nn

PyTree = Any


class MLCHeads(nnx.Module):
    """Linear, batch norm, ReLU, linear, ReLU, and two linear heads, each divided by its length.

    The network of CPP (arXiv 2306.05272, on frozen features; there ``hidden`` is 4096 and ``d`` 128).  A new module is
    in evaluation mode.

    Args:
      in_features: Width of a flattened input.
      hidden: Width of both layers of the trunk.
      d: Width of the features.
      batch_norm: Whether the first layer is normalized.
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: A width is below 1.
    """

    def __init__(self, in_features: int, hidden: int = 4096, d: int = 128, *, batch_norm: bool = True, rngs: nnx.Rngs):
        for name, width in (("in_features", in_features), ("hidden", hidden), ("d", d)):
            if width < 1:
                raise ValueError(f"{name}: expected a width of at least 1, got {width}")
        self.first = nn.Linear(in_features, hidden, rngs=rngs)
        self.norm = nn.BatchNorm(hidden, axis="mlp") if batch_norm else None
        self.second = nn.Linear(hidden, hidden, axes=("mlp", "embed"), rngs=rngs)
        self.feature_head = nn.Linear(hidden, d, axes=("embed", None), rngs=rngs)
        self.cluster_head = nn.Linear(hidden, d, axes=("embed", None), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps ``[batch, ...]`` to features ``Z`` and cluster features ``C``, both ``[batch, d]`` of unit length."""
        x = self.first(x.reshape(x.shape[0], -1))
        x = x if self.norm is None else self.norm(x)
        x = jax.nn.relu(self.second(jax.nn.relu(x)))
        return linalg.unit_vectors(self.feature_head(x)), linalg.unit_vectors(self.cluster_head(x))


def copy_feature_head(params: PyTree) -> PyTree:
    """Starts the cluster head as a copy of the feature head, so that the membership begins at that of the features.

    Args:
      params: Parameters as nested dicts, with ``feature_head`` and ``cluster_head``.

    Returns:
      The parameters with other arrays in ``cluster_head``.

    Raises:
      ValueError: A head is missing, or they differ in shape.
    """
    missing = {"feature_head", "cluster_head"} - set(params)
    if missing:
        raise ValueError(f"params: expected feature_head and cluster_head, got no {' and no '.join(sorted(missing))}")
    shapes = [jax.tree.map(jnp.shape, params[name]) for name in ("feature_head", "cluster_head")]
    if shapes[0] != shapes[1]:
        raise ValueError(f"params: expected heads of one shape, got {shapes[0]} and {shapes[1]}")
    return {**params, "cluster_head": jax.tree.map(jnp.copy, params["feature_head"])}
