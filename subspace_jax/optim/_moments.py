"""Moments inside the state of any Optax transform."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class Moments:
    """Where a state has moments, that is trees like the projected gradients; all else is counters."""

    def __init__(self, low: PyTree, state: optax.OptState, structure: Any):
        kind, shapes = jax.tree.structure(low), [x.shape for x in jax.tree.leaves(low)]

        def is_moment(x):
            same = bool(shapes) and jax.tree.structure(x) == kind
            return same and [jnp.shape(y) for y in jax.tree.leaves(x)] == shapes

        entries, self._outside = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_moment)
        self._at = [i for i, (_, x) in enumerate(entries) if is_moment(x)]
        self._structure = structure
        paths = [entries[i][0] for i in self._at]
        self.names = [str(getattr(p[-1], "name", getattr(p[-1], "key", ""))) if p else "" for p in paths]

    def take(self, state: optax.OptState) -> list[PyTree]:
        """The moments of a state."""
        values = self._outside.flatten_up_to(state)
        return [values[i] for i in self._at]

    def put(self, state: optax.OptState, moments: list[PyTree]) -> optax.OptState:
        """The state with other moments, which may be of other leaves."""
        values = self._outside.flatten_up_to(state)
        for i, tree in zip(self._at, moments, strict=True):
            values[i] = tree
        return self._outside.unflatten(values)

    def of(self, state: optax.OptState) -> list[list[jax.Array]]:
        """Lists of leaves of the moments of a state."""
        return [self._structure.flatten_up_to(tree) for tree in self.take(state)]


def check_moments(low: PyTree, state: optax.OptState, structure: Any) -> None:
    """Raises ValueError where a state has arrays that are neither moments nor counters."""
    inside = {id(x) for leaves in Moments(low, state, structure).of(state) for x in leaves}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if id(x) not in inside and jnp.ndim(x) > 0:
            raise ValueError(
                f"inner: expected a state of counters and of moments shaped like the projected gradients, which can "
                f"be reset, rotated or stepped leafwise, got {jnp.shape(x)} at {jax.tree_util.keystr(path)}; "
                "use moments='keep' and leafwise=False"
            )
