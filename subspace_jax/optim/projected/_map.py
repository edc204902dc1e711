"""The walk over the leaves of a tree that all transforms of projected gradients share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import absent, automatic, spec_of
from subspace_jax.optim._basis import Basis, present
from subspace_jax.optim.projected._plan import LeafPlan, from_matrices, to_matrices

PyTree = Any
Plans = list[LeafPlan | None]

HOLE = optax.MaskedNode()

# A leaf from which the kinds of entries are read where a tree has none.
_EXAMPLE = LeafPlan(0, "", 1, "full", ((), (0,), (1,)), (1, 1))


def map_projected(
    kind: type,
    leaf_init: Callable[[LeafPlan, jax.Array], tuple],
    leaf_step: Callable[..., tuple],
    plans_for: Callable[[PyTree], tuple[Plans, Any]],
    fallback: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A transform that steps projected leaves one by one, and gives all other leaves to a fallback.

    Args:
      kind: State, a NamedTuple of ``count``, the entries of ``leaf_init`` as trees like the parameters (with
        ``optax.MaskedNode`` at leaves that are not projected), and ``fallback``.
      leaf_init: ``leaf_init(plan, x)`` returns the entries of a leaf: arrays, a :class:`Basis`, or None.
      leaf_step: ``leaf_step(plan, count, g, entries) -> (direction, entries)`` for a leaf ``g [..., m, n]``.
      plans_for: Returns plans and structure of a tree.
      fallback: For leaves that are not projected.
    """

    @functools.cache
    def example():
        return jax.eval_shape(lambda: leaf_init(_EXAMPLE, jnp.zeros((1, 1))))

    def init(params):
        _checks.check_real(params)
        plans, structure = plans_for(params)
        leaves = jax.tree.leaves(params)
        rows = [
            None if plan is None else [filled(entry, x) for entry in leaf_init(plan, x)]
            for plan, x in zip(plans, leaves, strict=True)
        ]
        trees = [_tree(like, i, rows, structure) for i, like in enumerate(example())]
        return kind(jnp.zeros((), jnp.int32), *trees, init_fallback(fallback, plans, structure, params))

    def run(plan, row, count):
        g, entries = row
        known = tuple(present(entry) if isinstance(entry, Basis) else entry for entry in entries)
        d, new = leaf_step(plan, count, to_matrices(plan, g), known)
        new = [filled(entry, old) for entry, old in zip(new, entries, strict=True)]
        return from_matrices(plan, d, g.shape).astype(g.dtype), new

    def update(updates, state, params=None, **extra_args):
        plans, structure = plans_for(updates)
        columns = [_column(like, tree, structure) for like, tree in zip(example(), state[1:-1], strict=True)]
        entries = [list(own) for own in zip(*columns, strict=True)]
        rows = list(zip(jax.tree.leaves(updates), entries, strict=True))
        results = over_leaves(run, plans, rows, state.count, lambda plan, row: spec_of(row))
        rows = [result and result[1] for result in results]
        trees = [_tree(like, i, rows, structure) for i, like in enumerate(example())]
        directions = [result and result[0] for result in results]
        directions, after = update_fallback(
            fallback, plans, structure, directions, (updates, state.fallback, params), extra_args
        )
        return directions, kind(optax.safe_increment(state.count), *trees, after)

    return optax.GradientTransformationExtraArgs(init, update)


def over_leaves(f: Callable, plans: Plans, rows: list, count: jax.Array, specs: Callable) -> list:
    """``f(plan, row, count)`` of each projected leaf, and None for all others.

    Sharding inside is left to the compiler; under Explicit mesh axes results have the PartitionSpecs
    ``specs(plan, row)``.
    """
    return [
        None
        if plan is None
        else automatic(functools.partial(f, plan), (row, count), functools.partial(specs, plan, row))
        for plan, row in zip(plans, rows, strict=True)
    ]


def filled(entry: Any, old: Any) -> Any:
    """An entry, with placeholders for the missing sides of a basis, taken from the old basis or created for a leaf."""
    if not isinstance(entry, Basis):
        return entry
    olds = old if isinstance(old, Basis) else (absent(old), absent(old))
    return Basis(*(x if y is None else y for x, y in zip(olds, entry, strict=True)))


def bases_in(sides: Basis, structure: Any) -> list[Basis]:
    """The bases of all leaves, with placeholders, from the trees of a state."""
    return [Basis(*pair) for pair in zip(*map(structure.flatten_up_to, sides), strict=True)]


def sides_of(bases: list[Basis | None], structure: Any) -> Basis:
    """The inverse of :func:`bases_in`, None standing for leaves that are not projected."""
    return Basis(*(tree_of([basis and basis[i] for basis in bases], structure) for i in range(2)))


def tree_of(leaves: list, structure: Any) -> PyTree:
    """A tree with holes at leaves that are None."""
    return structure.unflatten([HOLE if x is None else x for x in leaves])


def _column(like, tree, structure):
    if like is None:
        return [None] * structure.num_leaves
    return bases_in(tree, structure) if isinstance(like, Basis) else structure.flatten_up_to(tree)


def _tree(like, i, rows, structure):
    column = [row and row[i] for row in rows]
    if like is None:
        return None
    return sides_of(column, structure) if isinstance(like, Basis) else tree_of(column, structure)


def _others(fallback, plans, structure):
    return optax.masked(fallback, lambda _: structure.unflatten([plan is None for plan in plans]))


def init_fallback(fallback: optax.GradientTransformation, plans: Plans, structure: Any, params: PyTree) -> Any:
    """State of the fallback for leaves that are not projected."""
    return _others(fallback, plans, structure).init(params)


def update_fallback(
    fallback: optax.GradientTransformation, plans: Plans, structure: Any, directions: list, args: tuple, extra: dict
) -> tuple[PyTree, Any]:
    """Directions of all leaves, and the state of the fallback after its update of ``args``."""
    updates, after = _others(fallback, plans, structure).update(*args, **extra)
    both = zip(directions, structure.flatten_up_to(updates), jax.tree.leaves(args[0]), strict=True)
    return structure.unflatten([x.astype(g.dtype) if d is None else d for d, x, g in both]), after
