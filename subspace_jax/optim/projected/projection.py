"""Any Optax transform in a low-rank subspace of the gradients.

The scheme is that of Zhao et al., "GaLore" (arXiv 2403.03507), with any optimizer inside, refreshes without
singular value decompositions, and staggered over leaves.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import spec_of
from subspace_jax.optim._basis import Basis, bases_of, present, project, project_back, rotate
from subspace_jax.optim.projected._map import (
    bases_in,
    filled,
    init_fallback,
    over_leaves,
    sides_of,
    tree_of,
    update_fallback,
)
from subspace_jax.optim.projected._moments import Moments, check_moments, second_moments
from subspace_jax.optim.projected._plan import from_matrices, matrix_specs, plans_for, to_matrices, zero_state
from subspace_jax.optim.projected._refresh import in_turns, new_basis, slice_by_slice
from subspace_jax.optim.projected.options import ProjectionOptions, RankRule, check_rank, checked

PyTree = Any


class LowRankProjectionState(NamedTuple):
    """State of :func:`low_rank_projection`; ``optax.MaskedNode`` stands for leaves that are not projected.

    Attributes:
      count: Steps taken, int32 scalar.
      sides: Left and right bases, two trees like the parameters, ``[..., m, r]`` and ``[..., n, r]``, float32 (float64
        for float64 parameters); ``[1]`` where a leaf has no basis of that side.
      inner: State of the inner transform, for leaves of the projected shapes.
      fallback: State of the fallback for other leaves.
    """

    count: jax.Array
    sides: Basis
    inner: optax.OptState
    fallback: optax.OptState

    @property
    def bases(self) -> PyTree:
        """Tree like the parameters, of :class:`Basis`: None for a side on which a leaf isn't projected."""
        return bases_of(self.sides)


def low_rank_projection(
    inner: optax.GradientTransformation,
    rank: int | RankRule,
    projection: ProjectionOptions | None = None,
    *,
    scale: ArrayLike = 1.0,
    fallback: optax.GradientTransformation | None = None,
    leafwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform on gradients that are projected to a low-rank subspace, and projects its updates back.

    A kernel ``G [..., m, n]``, leading axes a stack, becomes ``P^T G`` (left), ``G Q`` (right) or ``P^T G Q`` (full),
    with bases of the leading singular subspaces of a recent gradient.  The inner transform, its state included, sees
    only these, and parameters that are projected likewise: weight decay inside would decay what lies in the subspace,
    and belongs after this transform.

    Args:
      inner: Any transform.
      rank: Columns of a basis, clipped to the shorter side of a kernel; or a rule ``rank(path, shape)`` that returns
        it for each leaf, None for leaves that are not projected.  An integer projects leaves of at least two axes.
      projection: How gradients are projected.
      scale: Factor on updates of projected leaves.
      fallback: For leaves that are not projected; by default another instance of ``inner``.
      leafwise: Whether ``inner`` treats every matrix by itself, as Adam does and a clip by the norm of all does not.
        Stacks are then stepped one slice at a time, along their first batch axis, in the memory of one; else the
        projected gradients of all leaves are in memory at once.

    Returns:
      The transform.  Updates have the dtypes of the gradients; projected gradients and all state are float32, or
      float64 for float64.  Complex parameters are refused.

    Raises:
      TypeError: ``rank`` or an integer of ``projection`` is traced or not an integer, or ``inner`` or ``fallback``
        is no transform.
      ValueError: An option is unknown or out of range.  ``init`` raises it for an inner transform that
        fails on projected gradients, returns other shapes, or changes those of its state; and, where moments are
        reset or rotated or steps are leafwise, for one whose state has arrays that are no moments of projected
        gradients, or moments that can't be rotated.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax import optim
      >>> tx = optim.low_rank_projection(optax.sgd(0.1, momentum=0.9), rank=2)
      >>> params = {"kernel": jax.numpy.ones((3, 8, 4)), "bias": jax.numpy.ones(4)}
      >>> state = tx.init(params)
      >>> state.bases["kernel"].right.shape, state.inner[0].trace["kernel"].shape
      ((3, 4, 2), (3, 8, 2))
    """
    check_rank(rank)
    projection = checked(projection or ProjectionOptions())
    _checks.check_number("scale", scale, 0)
    _checks.check_transform("inner", inner)
    if fallback is not None:
        _checks.check_transform("fallback", fallback)
    inner = optax.with_extra_args_support(inner)
    fallback = _in_working_dtype(inner) if fallback is None else fallback
    tx = _LowRankProjection(inner, optax.with_extra_args_support(fallback), rank, projection, scale, leafwise)
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


class _Row(NamedTuple):
    """What a step reads of one leaf; lists have an array for each moment, and are empty where none is needed."""

    gradient: jax.Array
    basis: Basis
    moments: list[jax.Array]
    resets: list[jax.Array]
    weight: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _LowRankProjection:
    """``init`` and ``update`` of :func:`low_rank_projection`, whose arguments are the fields."""

    inner: optax.GradientTransformationExtraArgs
    fallback: optax.GradientTransformationExtraArgs
    rank: int | RankRule
    options: ProjectionOptions
    scale: ArrayLike
    leafwise: bool

    def init(self, params):
        _checks.check_real(params)
        plans, structure = plans_for(params, self.rank, self.options)
        rows = [plan and zero_state(plan, x) for plan, x in zip(plans, jax.tree.leaves(params), strict=True)]
        bases = [row and filled(row[0], x) for row, x in zip(rows, jax.tree.leaves(params), strict=True)]
        low = tree_of([row and row[1] for row in rows], structure)
        inner_state = self.inner.init(low)
        _check_inner(self.inner, low, inner_state)
        if self.options.moments != "keep" or self.leafwise:
            check_moments(low, inner_state, structure)
        if self.options.moments == "rotate":
            second_moments(self.inner, low, inner_state, structure)
        rest = init_fallback(self.fallback, plans, structure, params)
        return LowRankProjectionState(jnp.zeros((), jnp.int32), sides_of(bases, structure), inner_state, rest)

    def update(self, updates, state, params=None, **extra_args):
        plans, structure = plans_for(updates, self.rank, self.options)
        leaves = jax.tree.leaves(updates)
        like = [
            plan and jax.ShapeDtypeStruct(plan.low_shape, linalg.working_dtype(g))
            for plan, g in zip(plans, leaves, strict=True)
        ]
        found = Moments(tree_of(like, structure), state.inner, structure)
        weights = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        columns = bases_in(state.sides, structure), *self._moments_of(found, state.inner, len(leaves)), weights
        rows = [_Row(*row) for row in zip(leaves, *columns, strict=True)]
        move = self._leaf_by_leaf if self.leafwise else self._all_leaves
        directions, bases, inner_state = move(found, plans, rows, state, extra_args)
        updates, rest = update_fallback(
            self.fallback, plans, structure, directions, (updates, state.fallback, params), extra_args
        )
        count = optax.safe_increment(state.count)
        return updates, LowRankProjectionState(count, sides_of(bases, structure), inner_state, rest)

    def _moments_of(self, found, inner_state, num_leaves):
        """For each leaf its moments, and what a reset makes of them; empty where these are not needed."""
        nothing = [[]] * num_leaves
        if self.options.moments == "keep" and not self.leafwise:
            return nothing, nothing
        slots = found.of(inner_state)
        moments = [[column[i] for column in slots] for i in range(num_leaves)]
        if self.options.moments != "reset":
            return moments, nothing
        start = found.of(self.inner.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found.low)))
        # Gradients may be of a coarser dtype than the parameters that the state began with.
        start = jax.tree.map(lambda x, old: x.astype(old.dtype), start, slots)
        return moments, [[column[i] for column in start] for i in range(num_leaves)]

    def _refresh(self, plan, seconds, count, row, g):
        """Basis and moments of a leaf ``g [..., m, n]`` after the refresh of the slices that have one."""
        options, known = self.options, present(row.basis)

        def new(key, g, basis):
            return new_basis(plan, options, key, count == 0, g, basis)

        def refresh(key, x, old):
            (g, resets), (basis, own) = x, old
            fresh = new(key, g, basis)
            if options.moments == "reset":
                return fresh, resets
            rotated = [rotate(basis, fresh, x, second=second) for x, second in zip(own, seconds, strict=True)]
            # There is nothing to rotate from at the first step, where old bases are zero.
            return fresh, [jnp.where(count == 0, x, y) for x, y in zip(own, rotated, strict=True)]

        if options.moments == "keep":
            return in_turns(new, plan, options, count, g, known), row.moments
        return in_turns(refresh, plan, options, count, (g, row.resets), (known, row.moments))

    def _seconds(self, found, inner_state):
        if self.options.moments != "rotate":
            return []
        return second_moments(self.inner, found.low, inner_state, found.structure)

    def _all_leaves(self, found, plans, rows, state, extra_args):
        """One update of the inner transform with all projected gradients."""
        seconds, structure = self._seconds(found, state.inner), found.structure

        def down(plan, row, count):
            g, w = to_matrices(plan, row.gradient), row.weight
            basis, moments = self._refresh(plan, seconds, count, row, g)
            # Compiled away where the inner transform does not read it.
            w = None if w is None else project(basis, to_matrices(plan, w)).astype(linalg.working_dtype(w))
            return project(basis, g), w, filled(basis, row.basis), moments

        def down_specs(plan, row):
            low = matrix_specs(plan, row.gradient)[1]
            return low, None if row.weight is None else low, spec_of(row.basis), spec_of(row.moments)

        def up(plan, row, count):
            del count
            g, basis, low = row
            return from_matrices(plan, self._back(present(basis), low, g.dtype), g.shape)

        results = over_leaves(down, plans, rows, state.count, down_specs)
        lows, weights, bases, moments = ([result and result[i] for result in results] for i in range(4))
        inner_state = found.put_leaves(state.inner, moments) if self.options.moments != "keep" else state.inner
        weights = None if _without_params(rows) else tree_of(weights, structure)
        low_updates, inner_state = self.inner.update(tree_of(lows, structure), inner_state, weights, **extra_args)
        low_updates = structure.flatten_up_to(low_updates)
        rows = [(row.gradient, basis, low) for row, basis, low in zip(rows, bases, low_updates, strict=True)]
        directions = over_leaves(up, plans, rows, state.count, lambda plan, row: spec_of(row[0]))
        return directions, bases, inner_state

    def _leaf_by_leaf(self, found, plans, rows, state, extra_args):
        """An update of the inner transform for each leaf, of a stack for each slice, and one for its counters."""
        seconds = self._seconds(found, state.inner)

        def step(plan, args, count):
            row, inner_state, extra_args = args
            g, w = (x if x is None else to_matrices(plan, x) for x in (row.gradient, row.weight))
            basis, moments = self._refresh(plan, seconds, count, row, g)

            def one(_, fixed, old):
                (basis, w), (g, own) = fixed, old
                w = None if w is None else project(basis, w).astype(linalg.working_dtype(w))
                low, after = self.inner.update(project(basis, g), found.put(inner_state, own), w, **extra_args)
                return self._back(basis, low, g.dtype), found.take(after)

            d, moments = slice_by_slice(one, (basis, w), (g, moments))
            return from_matrices(plan, d, row.gradient.shape), filled(basis, row.basis), moments

        def specs(plan, args):
            del plan
            return spec_of((args[0].gradient, args[0].basis, args[0].moments))

        args = [(row, state.inner, extra_args) for row in rows]
        results = over_leaves(step, plans, args, state.count, specs)
        directions, bases, moments = ([result and result[i] for result in results] for i in range(3))
        nothing = tree_of([None] * len(plans), found.structure)
        without = found.put(state.inner, [nothing] * len(found.names))
        _, after = self.inner.update(nothing, without, None if _without_params(rows) else nothing, **extra_args)
        return directions, bases, found.put_leaves(after, moments)

    def _back(self, basis, low, dtype):
        factor = jnp.asarray(self.scale).astype(low.dtype)
        # A bfloat16 gradient gets its update by a bfloat16 matmul.
        low = (factor * low).astype(dtype) if dtype == jnp.bfloat16 else factor * low
        return project_back(basis, low).astype(dtype)


def _without_params(rows):
    return bool(rows) and all(row.weight is None for row in rows)


def _in_working_dtype(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The transform with a float32 state for parameters of 16 bits."""

    def wide(tree):
        floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(linalg.working_dtype(x)) if floating(x) else x, tree)

    def update(updates, state, params=None, **extra_args):
        return inner.update(wide(updates), state, wide(params), **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(wide(params)), update)


def _check_inner(inner, low, state) -> None:
    """Raises ValueError unless the inner transform can be run on projected gradients."""
    try:
        updates, after = jax.eval_shape(inner.update, low, state, low)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"inner: its update fails on projected gradients: {error}") from error
    for what, old, new in (
        ("updates like the projected gradients", low, updates),
        ("a state that keeps its shapes over a step", state, after),
    ):
        shapes = [[jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (old, new)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"inner: expected {what}, {shapes[0]}, got {shapes[1]}")
        if jax.tree.structure(old) != jax.tree.structure(new):
            raise ValueError(f"inner: expected {what}, {jax.tree.structure(old)}, got {jax.tree.structure(new)}")
