"""Any Optax transform in a low-rank subspace of the gradients.

The scheme is that of Zhao et al., "GaLore" (arXiv 2403.03507), with any optimizer inside, refreshes without
singular value decompositions, and leaves that take turns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _checks
from subspace_jax.optim._moments import Moments, check_moments, second_moments
from subspace_jax.optim.projected import _shared as _projected
from subspace_jax.optim.projected._shared import AxesRule, Basis, LeafPlan, RankRule

PyTree = Any

MOMENTS = ("keep", "reset", "rotate")


class LowRankProjectionState(NamedTuple):
    """State of :func:`low_rank_projection`.

    Attributes:
      count: Steps taken, int32 scalar.
      sides: Left and right bases, two trees like the parameters, ``[..., m, r]`` and ``[..., n, r]``, float32 (float64
        for float64 parameters); ``[1]`` where a leaf has no basis of that side.
      inner: State of the inner transform, for leaves of the projected shapes.
      fallback: State of the fallback, None without one.
    """

    count: jax.Array
    sides: Basis
    inner: optax.OptState
    fallback: optax.OptState

    @property
    def bases(self) -> PyTree:
        """Tree like the parameters, of :class:`Basis`: None for a side on which a leaf isn't projected."""
        return _projected.bases_of(self.sides)


def low_rank_projection(
    inner: optax.GradientTransformation,
    rank: int | RankRule,
    *,
    side: str = "std",
    refresh_every: int = 200,
    method: str = "subspace_iteration",
    rounds: int = 2,
    moments: str = "keep",
    staggered: bool = True,
    scale: ArrayLike = 1.0,
    fallback: optax.GradientTransformation | None = None,
    leafwise: bool = False,
    axes: AxesRule | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform on gradients that are projected to a low-rank subspace, and takes its updates back.

    A kernel ``G [..., m, n]``, leading axes a stack, becomes ``P^T G`` (left), ``G Q`` (right) or ``P^T G Q`` (full),
    with bases of the leading singular subspaces of a recent gradient.  The inner transform, its state included, sees
    only these, and parameters that are projected likewise: weight decay inside would decay what lies in the subspace,
    and belongs after this transform.

    Bases are renewed by the step counter, in ``lax.cond`` and loops, without a wait for the host.  Under ``vmap`` these
    are selects, and every step pays for a refresh: stack kernels along a leading axis instead.

    Args:
      inner: Any transform.
      rank: Columns of a basis, clipped to the shorter side of a kernel; or a rule ``rank(path, shape)`` that returns
        it for each leaf, None for leaves that are not projected.  With a number, leaves of at least two axes are.
      side: "left" (``P`` on the rows, which are the inputs of a kernel ``[in, out]``), "right" (the columns), "std"
        (right if ``m >= n``, else left: the state is ``max(m, n) x r``), "reverse_std" (the opposite) or "full".
      refresh_every: Steps between refreshes.
      method: "svd" (exact, canonical signs; slow to run, and on accelerators to compile), "randomized" (a sketch),
        "subspace_iteration" (from the basis before, products and QR only), or "random" (Haar, whatever the gradient).
      rounds: Products with ``G G^T`` in a subspace iteration; the first one, without a basis before, makes more.
      moments: At a refresh the inner moments "keep" their numbers, "reset" to what ``inner.init`` gives, or "rotate"
        into the new coordinates: by the cosines between old and new basis, second moments by the squared cosines.
        What changes its sign with the gradient is a first moment, what never gets negative a second one; a transform
        of other moments is refused.  Step counters stay, whatever is chosen.
      staggered: Leaves take turns over ``refresh_every`` steps, and so do the slices of a leaf along its first batch
        axis, which had better not be sharded; else all are renewed at once.  The first step renews all in any case.
      scale: Factor on updates of projected leaves.
      fallback: For leaves that are not projected, with parameters at hand; None gives them to ``inner`` as they are.
      leafwise: Whether ``inner`` treats every matrix by itself, as Adam does and a clip by the norm of all does not.
        Stacks are then stepped one slice at a time, along their first batch axis, in the memory of one; else the
        projected gradients of all leaves are there at once.
      axes: Rule ``axes(path, shape)`` that returns the :class:`MatrixAxes` of kernels of more than two axes that are
        not ``[..., m, n]``.
      seed: Seed of what is random.

    Returns:
      The transform.  Updates have the dtypes of the gradients; R and all state are float32, or float64 for float64.
      Complex parameters are refused.

    Raises:
      TypeError: ``rank``, ``refresh_every``, ``rounds`` or ``seed`` is traced or not a whole number, or ``inner`` or
        ``fallback`` is no transform.
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
    _projected.check_rank(rank)
    _checks.check_choice("side", side, _projected.SIDES)
    _checks.check_choice("method", method, _projected.METHODS)
    _checks.check_choice("moments", moments, MOMENTS)
    refresh_every = _checks.static_int("refresh_every", refresh_every, 1)
    rounds = _checks.static_int("rounds", rounds, 1)
    seed = _checks.static_int("seed", seed, 0)
    _checks.check_number("scale", scale, 0)
    _checks.check_rule("axes", axes)
    for name, value in (("inner", inner), *([] if fallback is None else [("fallback", fallback)])):
        _checks.check_transform(name, value)
    inner = optax.with_extra_args_support(inner)
    fallback = None if fallback is None else optax.with_extra_args_support(fallback)

    def others(plans, leaves, structure):
        """The leaves for the fallback, and holes for all others."""
        hole = optax.MaskedNode()
        return structure.unflatten([hole if plan else x for plan, x in zip(plans, leaves, strict=True)])

    def init(params):
        plans, structure = _projected.plans_for(params, rank, side, axes)
        leaves = jax.tree.leaves(params)
        bases, lows = [], []
        for plan, x in zip(plans, leaves, strict=True):
            if plan is not None:
                basis, low = _projected.zero_state(plan, x)
            else:
                basis, low = Basis(), x.astype(linalg.working_dtype(x)) if _is_floating(x) else x
                low = low if fallback is None else optax.MaskedNode()
            bases.append(basis)
            lows.append(low)
        sides = _projected.put_bases(_projected.no_bases(structure, leaves), bases, structure)
        low = structure.unflatten(lows)
        inner_state = inner.init(low)
        _check_inner(inner, low, inner_state)
        if moments != "keep" or leafwise:
            check_moments(low, inner_state, structure)
        if moments == "rotate":
            second_moments(inner, low, inner_state, structure)
        rest = None if fallback is None else fallback.init(others(plans, leaves, structure))
        return LowRankProjectionState(jnp.zeros((), jnp.int32), sides, inner_state, rest)

    def update(updates, state, params=None, **extra_args):
        plans, structure = _projected.plans_for(updates, rank, side, axes)
        leaves, bases = jax.tree.leaves(updates), _projected.bases_in(state.sides, plans, structure)
        like = [_low_like(plan, g, fallback) for plan, g in zip(plans, leaves, strict=True)]
        like = structure.unflatten(like)
        found = Moments(like, state.inner, structure)
        known = [None] * len(leaves) if params is None else structure.flatten_up_to(params)
        slots = found.of(state.inner) if moments != "keep" or leafwise else []
        seconds = second_moments(inner, like, state.inner, structure) if moments == "rotate" else []
        fresh = []
        if moments == "reset":
            start = inner.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))
            # Gradients may be of a coarser dtype than the parameters that the state began with.
            fresh = jax.tree.map(lambda x, old: x.astype(old.dtype), found.of(start), slots)
        stacks = [leafwise and plan is not None and len(plan.shape) > 2 for plan in plans]
        hole, done, moved = optax.MaskedNode(), {}, {}

        lows, turns = [], _projected.turns_of(plans, refresh_every, staggered)
        for i, (plan, g) in enumerate(zip(plans, leaves, strict=True)):
            if plan is None:
                low = g.astype(linalg.working_dtype(g)) if _is_floating(g) else g
                lows.append(low if fallback is None else hole)
                continue
            own, resets = ([values[i] for values in lists] for lists in (slots, fresh))
            args = plan, turns[i], g, bases[i], own, seconds, resets, state.count
            if stacks[i]:
                done[i], bases[i], moved[i] = _step_stack(*args, known[i], state.inner, found, extra_args)
                lows.append(hole)
                continue
            low, bases[i], own = _project_leaf(*args)
            lows.append(low)
            for values, value in zip(slots, own, strict=True):
                values[i] = value

        inner_state = state.inner
        if slots:
            trees = [[hole if stack else x for x, stack in zip(values, stacks, strict=True)] for values in slots]
            inner_state = found.put(inner_state, [structure.unflatten(values) for values in trees])
        weights = None
        if params is not None:
            # Compiled away where the inner transform does not look at it.
            weights = [
                hole if stack else _project_params(plan, w, basis) if plan else low if fallback else w.astype(low.dtype)
                for plan, w, basis, low, stack in zip(plans, known, bases, lows, stacks, strict=True)
            ]
            weights = structure.unflatten(weights)
        low_updates, inner_state = inner.update(structure.unflatten(lows), inner_state, weights, **extra_args)
        if any(stacks):
            slots = found.of(inner_state)
            for i, own in moved.items():
                for values, value in zip(slots, own, strict=True):
                    values[i] = value
            inner_state = found.put(inner_state, [structure.unflatten(values) for values in slots])
        updates, rest = structure.flatten_up_to(low_updates), state.fallback
        if fallback is not None:
            weights = None if params is None else others(plans, known, structure)
            unprojected, rest = fallback.update(others(plans, leaves, structure), rest, weights, **extra_args)
            unprojected = structure.flatten_up_to(unprojected)
            updates = [low if plan else x for plan, low, x in zip(plans, updates, unprojected, strict=True)]
        for i, (plan, g) in enumerate(zip(plans, leaves, strict=True)):
            if plan is None:
                updates[i] = updates[i].astype(g.dtype)
            else:
                updates[i] = done[i] if stacks[i] else _back_leaf(plan, g, bases[i], updates[i])
        count = optax.safe_increment(state.count)
        sides = _projected.put_bases(state.sides, bases, structure)
        return structure.unflatten(updates), LowRankProjectionState(count, sides, inner_state, rest)

    def renewed(plan, turns, g, basis, own, seconds, resets, count):
        """Bases and moments after a refresh, of those slices of ``g [..., m, n]`` that have one."""

        def refresh(key, x, old):
            (g, resets), (basis, own) = x, old
            new = _projected.new_basis(plan, g, basis, method, key, count == 0, rounds)
            if moments == "rotate":
                turned = [
                    _projected.rotated(basis, new, x, second=second) for x, second in zip(own, seconds, strict=True)
                ]
                # There is nothing to rotate from at the first step, where old bases are zero.
                return new, [jnp.where(count == 0, x, y) for x, y in zip(own, turned, strict=True)]
            return new, resets if moments == "reset" else own

        key = _projected.leaf_key(seed, plan, count)
        if moments == "keep":
            return _projected.renew(
                lambda key, g, basis: refresh(key, (g, []), (basis, []))[0], turns, refresh_every, count, key, g, basis
            ), own
        return _projected.renew(refresh, turns, refresh_every, count, key, (g, resets), (basis, own))

    def _project_leaf(plan, turns, g, basis, own, seconds, resets, count):
        def run(g, basis, own, resets, count):
            g = _projected.to_matrices(plan, g)
            new, moved = renewed(plan, turns, g, basis, own, seconds, resets, count)
            return _projected.project(new, g), new, moved

        def specs():
            return _projected.matrix_specs(plan, g)[1], _projected.spec_of(basis), _projected.spec_of(own)

        return _projected.automatic(run, (g, basis, own, resets, count), specs)

    def _step_stack(plan, turns, g, basis, own, seconds, resets, count, weights, inner_state, found, extra_args):
        def run(g, basis, own, resets, count, weights, inner_state, extra_args):
            x = _projected.to_matrices(plan, g)
            basis, own = renewed(plan, turns, x, basis, own, seconds, resets, count)
            weights = None if weights is None else _projected.to_matrices(plan, weights)

            def one(_, fixed, old):
                (basis, w), (g, own) = fixed, old
                w = None if w is None else _projected.project(basis, w).astype(linalg.working_dtype(w))
                low, state = inner.update(_projected.project(basis, g), found.put(inner_state, own), w, **extra_args)
                return back(basis, low, g.dtype), found.take(state)

            x, own = _projected.slice_by_slice(one, (basis, weights), (x, own))
            return _projected.from_matrices(plan, x, g.shape), basis, own

        args = g, basis, own, resets, count, weights, inner_state, extra_args
        return _projected.automatic(run, args, lambda: _projected.spec_of((g, basis, own)))

    def back(basis, low, dtype):
        factor = jnp.asarray(scale).astype(low.dtype)
        # A bfloat16 gradient gets its update by a bfloat16 product.
        narrow = (factor * low).astype(dtype) if dtype == jnp.bfloat16 else factor * low
        return _projected.back(basis, narrow).astype(dtype)

    def _back_leaf(plan, g, basis, low):
        def run(basis, low):
            return _projected.from_matrices(plan, back(basis, low, g.dtype), g.shape)

        return _projected.automatic(run, (basis, low), lambda: _projected.spec_of(g))

    return optax.GradientTransformationExtraArgs(init, update)


def _project_params(plan, w, basis):
    def run(w, basis):
        return _projected.project(basis, _projected.to_matrices(plan, w)).astype(linalg.working_dtype(w))

    return _projected.automatic(run, (w, basis), lambda: _projected.matrix_specs(plan, w)[1])


def _is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _low_like(plan: LeafPlan | None, g: jax.Array, fallback) -> Any:
    if plan is None and fallback is not None:
        return optax.MaskedNode()
    dtype = linalg.working_dtype(g) if _is_floating(g) else g.dtype
    return jax.ShapeDtypeStruct(g.shape if plan is None else plan.low_shape, dtype)


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
