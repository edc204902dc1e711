"""Refreshes of bases: new ones, and the steps at which leaves and their slices get them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg
from subspace_jax.optim._basis import Basis
from subspace_jax.optim.projected._plan import LeafPlan
from subspace_jax.optim.projected.options import ProjectionOptions

PyTree = Any

# Rounds that a cold start of the subspace iteration takes beside the usual ones.
_COLD_ROUNDS = 3


def leaf_key(seed: int, plan: LeafPlan, count: jax.Array) -> jax.Array:
    """The random key of a leaf at a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), plan.index), count)


def refresh_basis(plan: LeafPlan, options: ProjectionOptions, count: jax.Array, g: jax.Array, basis: Basis) -> Basis:
    """The basis of a leaf after a step's refresh, if one is due."""

    def refresh(key, g, basis):
        return new_basis(plan, options, key, count == 0, g, basis)

    return in_turns(refresh, plan, options, count, g, basis)


def in_turns(
    refresh: Callable, plan: LeafPlan, options: ProjectionOptions, count: jax.Array, x: PyTree, old: PyTree
) -> PyTree:
    """``refresh(key, x, old)`` for the slices that are due, ``old`` for all others; the first step refreshes all.

    Args:
      refresh: Returns a tree like ``old``; works for a whole leaf and for a slice of it.
      plan: Plan of the leaf.
      options: Have ``refresh_every`` and ``seed``.
      count: Steps taken.
      x: What a refresh reads: arrays with the batch axes in front.
      old: What it replaces, likewise.
    """
    key, phase, turns = leaf_key(options.seed, plan, count), count % options.refresh_every, plan.turns
    if len(set(turns)) == 1:
        return jax.lax.cond((count == 0) | (phase == turns[0]), lambda: refresh(key, x, old), lambda: old)
    # Slices that are due are neighbours.  A loop over them computes no other, in the memory of one.
    at = np.asarray(turns, np.int32)
    first = jnp.where(count == 0, 0, jnp.sum(at < phase))
    last = jnp.where(count == 0, len(turns), jnp.sum(at <= phase))

    def one(i, new):
        return _put(new, refresh(jax.random.fold_in(key, i), *_at((x, new), i)), i)

    return jax.lax.fori_loop(first, last, one, old)


def slice_by_slice(step: Callable, x: PyTree, old: PyTree) -> PyTree:
    """``step(i, x, old)`` for each slice along the first batch axis, in place of ``old``, in the memory of one slice.

    A leaf without batch axes is one step, with None for ``i``.
    """
    if jax.tree.leaves(old)[0].ndim == 2:
        return step(None, x, old)

    def one(i, new):
        return _put(new, step(i, *_at((x, new), i)), i)

    return jax.lax.fori_loop(0, jax.tree.leaves(old)[0].shape[0], one, old)


def _at(tree, i):
    return jax.tree.map(lambda y: jax.lax.dynamic_index_in_dim(y, i, keepdims=False), tree)


def _put(tree, part, i):
    return jax.tree.map(lambda y, z: jax.lax.dynamic_update_index_in_dim(y, z, i, 0), tree, part)


def new_basis(
    plan: LeafPlan, options: ProjectionOptions, key: jax.Array, cold: jax.Array, g: jax.Array, basis: Basis
) -> Basis:
    """A basis of the leading subspace of ``g [..., m, n]``, the leaf or a slice; ``cold`` where there is no old one."""
    # The state keeps its dtype, whatever the gradient's is.
    g = g.astype(linalg.working_dtype(g, *jax.tree.leaves(basis)))
    *batch, m, n = g.shape
    if options.method == "random":
        keys = jax.random.split(key)
        sizes = (m if plan.side != "right" else None, n if plan.side != "left" else None)
        return Basis(
            *(
                None if size is None else linalg.random_orthonormal(k, size, plan.rank, tuple(batch), g.dtype)
                for k, size in zip(keys, sizes, strict=True)
            )
        )
    if options.method == "subspace_iteration":
        down, up = functools.partial(linalg.gram, g), functools.partial(linalg.times, g)
        rounds = options.rounds + jnp.where(cold, _COLD_ROUNDS, 0)
        if plan.side == "right":
            return Basis(right=_iterate(up, down, basis.right, key, cold, rounds))
        left = _iterate(down, up, basis.left, key, cold, rounds)
        return Basis(left, linalg.orthonormal_columns(down(left)) if plan.side == "full" else None)
    if options.method == "svd":
        u, _, vt = linalg.canonical_svd(g)
    else:
        u, _, vt = linalg.randomized_svd(key, g, plan.rank)
    left = None if plan.side == "right" else u[..., : plan.rank]
    return Basis(left, None if plan.side == "left" else vt[..., : plan.rank, :].mT)


def _iterate(there, back, start, key, cold, rounds):
    """Orthogonal iteration; positive QR moves columns towards singular vectors without jumps of order or sign."""

    def step(_, basis):
        return linalg.orthonormal_columns(back(linalg.orthonormal_columns(there(basis))))

    basis = jax.lax.cond(cold, lambda: jax.random.normal(key, start.shape, start.dtype), lambda: start)
    return jax.lax.fori_loop(0, rounds, step, basis)
