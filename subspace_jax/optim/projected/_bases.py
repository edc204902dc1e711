"""Transforms of gradients leaf by leaf, each with a given basis."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from subspace_jax.optim import _checks

PyTree = Any


def with_bases(
    bases: PyTree | Callable, of_leaf: Callable[[str, jax.Array, Any], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """A transform without a state that applies ``of_leaf(path, gradient, basis)`` where there is a basis.

    Args:
      bases: Tree like the parameters, with None for what is left as it is; or a rule ``bases(path, shape)``.
      of_leaf: Returns the new gradient.

    Returns:
      The transform, whose ``update`` raises ValueError where the trees differ.
    """

    def update(updates, state, params=None, **extra_args):
        del extra_args
        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        if params is not None and jax.tree.structure(params) != structure:
            raise ValueError(
                f"updates: expected the structure of params, {jax.tree.structure(params)}, got {structure}"
            )
        names = [_checks.path_name(path) for path, _ in paths]
        if callable(bases):
            found = [bases(name, g.shape) for name, (_, g) in zip(names, paths, strict=True)]
        else:
            found = structure.flatten_up_to(bases)
        rows = zip(names, paths, found, strict=True)
        results = [g if m is None else of_leaf(name, g, m) for name, (_, g), m in rows]
        return structure.unflatten(results), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
