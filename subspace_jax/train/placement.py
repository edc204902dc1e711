"""What host code returns, put where the train state lives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def placed(name: str, tree: PyTree, abstract: PyTree, shardings: PyTree) -> PyTree:
    """Puts what host code returns onto its shardings; raises ValueError where it has other shapes."""
    check_shapes(name, tree, abstract)

    def one(x, sharding):
        is_global = isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable)
        return jax.device_put(x if is_global else np.asarray(x), sharding)

    return strongly_typed(jax.tree.map(one, tree, shardings))


def strongly_typed(tree: PyTree) -> PyTree:
    """Removes weak types: a step returns strong ones, so that the next step would be compiled anew."""

    def one(x):
        found = jax.typeof(x)
        return jax.lax.convert_element_type(x, found.dtype) if found.weak_type else x

    return jax.tree.map(one, tree)


def check_shapes(name: str, tree: PyTree, abstract: PyTree) -> None:
    """Raises ValueError where a tree has another structure, or an array another shape or dtype."""
    if jax.tree.structure(tree) != jax.tree.structure(abstract):
        raise ValueError(f"{name}: expected {jax.tree.structure(abstract)}, got {jax.tree.structure(tree)}")

    def one(path, x, expected):
        if (np.shape(x), jnp.result_type(x)) != (expected.shape, expected.dtype):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}/{where}: expected {expected.dtype}{list(expected.shape)}, got "
                f"{jnp.result_type(x)}{list(np.shape(x))}"
            )

    jax.tree_util.tree_map_with_path(one, tree, abstract)


def without_aliases(tree: PyTree) -> PyTree:
    """Copies arrays that come twice: a step donates each."""
    seen: set[int] = set()

    def one(x):
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(one, tree)
