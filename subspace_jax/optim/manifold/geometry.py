"""One optimizer for subspaces, another for everything else."""

from typing import Any

import jax
import optax

PyTree = Any


def geometry_labels(params: PyTree) -> PyTree:
    """Labels the arrays under a key named ``bases`` "grassmann", and all others "euclidean".

    Args:
      params: Any tree of parameters: dicts, tuples, dataclasses, an ``nnx.State``.

    Returns:
      A tree of the same structure, of strings.
    """

    def label(path, _):
        names = {str(getattr(key, "key", getattr(key, "name", None))) for key in path}
        return "grassmann" if "bases" in names else "euclidean"

    return jax.tree_util.tree_map_with_path(label, params)


def with_geometry(
    euclidean_tx: optax.GradientTransformation, grassmann_tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Optimizes parameters named ``bases`` with one transform and all others with another.

    Whatever belongs to the Euclidean transform, weight decay above all, so never touches a basis.

    Args:
      euclidean_tx: For ordinary parameters.
      grassmann_tx: For orthonormal bases.

    Returns:
      The transform.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> schedule = optax.cosine_decay_schedule(1e-3, 10_000)
      >>> tx = optim.with_geometry(
      ...     optax.adamw(schedule, weight_decay=0.05), optim.riemannian_sgd(schedule, lr_factor=100.0)
      ... )
    """
    return optax.partition({"euclidean": euclidean_tx, "grassmann": grassmann_tx}, geometry_labels)
