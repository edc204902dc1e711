"""Fira and APOLLO: gradients of full rank, scaled by what Adam does to their low-rank projections."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _checks
from subspace_jax.optim.projected import _adam
from subspace_jax.optim.projected import _shared as _projected
from subspace_jax.optim.projected._shared import AxesRule, Basis, RankRule

PyTree = Any

# Growth of a norm from one step to the next that the limiter lets pass, and the guard of its quotients.
_GROWTH, _GUARD = 1.01, 1e-8


class ScaledGradientState(NamedTuple):
    """State of :func:`fira` and :func:`apollo`; trees like the parameters.

    Attributes:
      count: Steps taken, int32 scalar.
      sides: Left and right bases, two trees like the parameters, ``[1]`` where a leaf has none of that side; None for
        APOLLO, which draws its projections anew.
      mu: First moments of projected gradients; of gradients where leaves are not projected.
      nu: Second moments.
      norm: The norm that the limiter compares with, ``[...]`` for each stack, ``[1]`` where a leaf is not projected;
        None without a limiter.
    """

    count: jax.Array
    sides: Basis | None
    mu: PyTree
    nu: PyTree
    norm: PyTree

    @property
    def bases(self) -> PyTree:
        """Tree like the parameters, of :class:`Basis`: None for a side on which a leaf isn't projected."""
        return None if self.sides is None else _projected.bases_of(self.sides)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    *,
    refresh_every: int = 200,
    method: str = "subspace_iteration",
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    rounds: int = 2,
    staggered: bool = True,
    axes: AxesRule | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Fira (Chen et al., arXiv 2410.01623): GaLore, and what it leaves out of the gradient, scaled as Adam would.

    The residual ``G - scale P R`` of a kernel is multiplied, channel by channel of the longer side, by
    ``||N|| / ||R||``, and its norm may grow by 1% from step to step.  State as for :func:`galore`, one number more.

    Args:
      learning_rate: Number, or schedule of the step.
      rank: See :func:`low_rank_projection`, as all options not named here.
      refresh_every: Steps between refreshes.
      method: How bases are found; "svd" is that of the paper.
      scale: Factor on the low-rank part of the step, and on what the residual leaves out.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, before bias correction.
      weight_decay: Decoupled, after the step.
      rounds: Rounds of a subspace iteration.
      staggered: Whether leaves take turns.
      axes: Rows and columns of leaves.
      seed: Seed of what is random.

    Returns:
      The transform.  Its ``update`` needs ``params`` if there is weight decay.  State is float32 for 16-bit parameters,
      where Optax keeps their dtype; complex parameters are refused.

    Raises:
      TypeError: See :func:`low_rank_projection`.
      ValueError: See :func:`low_rank_projection`; and where weight decay lacks parameters.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> tx = optim.fira(1e-2, rank=2)
      >>> state = tx.init({"kernel": jax.numpy.ones((8, 4))})
    """
    _checks.check_choice("method", method, _projected.METHODS)
    _checks.check_number("scale", scale, 0)
    rounds = _checks.static_int("rounds", rounds, 1)

    def renewed(plan, g, basis, turns, count):
        def refresh(key, g, basis):
            return _projected.new_basis(plan, g, basis, method, key, count == 0, rounds)

        return _projected.renew(refresh, turns, refresh_every, count, _projected.leaf_key(seed, plan, count), g, basis)

    def step(plan, g, basis, mu, nu, norm, turns, count, at):
        del turns, at
        r = _projected.project(basis, g)
        mu, nu, n = _adam.moments(r, mu, nu, b1, b2, eps)
        alpha, g = jnp.asarray(scale).astype(r.dtype), g.astype(r.dtype)
        ratio = _channel_ratio(plan, n, r)
        # P has orthonormal columns: ||G - scale P R||^2 is ||G||^2 - scale (2 - scale) ||R||^2, channel by channel,
        # and the step is one product with P.  The difference cancels only where next to nothing is left to limit.
        axis = _low_rank_axis(plan)
        rest = _sum_of_squares(g, axis) - alpha * (2 - alpha) * _sum_of_squares(r, axis)
        now = jnp.sqrt(jnp.sum(jnp.square(ratio) * jnp.maximum(rest, 0), axis=(-2, -1), keepdims=True))
        factor = _limiter(now, norm, count)
        share = ratio / factor
        return g * share + alpha * _projected.back(basis, n - r * share), mu, nu, (now / factor)[..., 0, 0]

    scaled = _scaled_gradients(step, rank, refresh_every, staggered, axes, seed, b1, b2, eps, renewed=renewed)
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay))


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 256,
    *,
    refresh_every: int = 200,
    scaling: str = "channel",
    scale: ArrayLike = 1.0,
    scale_front: bool = False,
    limiter: bool = True,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    staggered: bool = True,
    axes: AxesRule | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO (Zhu et al., arXiv 2412.05270): gradients scaled by what Adam does to a random projection of them.

    The projection has entries of variance ``1 / r`` and is drawn anew from the seed at every step, so that no memory
    goes to it: the state of an ``m x n`` kernel is ``2 max(m, n) r`` numbers, and one for the limiter.

    Args:
      learning_rate: Number, or schedule of the step.
      rank: See :func:`low_rank_projection`, as all options not named here.
      refresh_every: Steps for which one projection serves.
      scaling: "channel" (one factor for each row or column of the longer side) or "tensor" (one for each matrix).
      scale: The gradient is multiplied by its root.
      scale_front: Whether that happens before the limiter or after it.
      limiter: Whether the norm of the step may grow by 1% only from step to step.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, before bias correction.
      weight_decay: Decoupled, after the step.
      staggered: Whether leaves take turns.
      axes: Rows and columns of leaves.
      seed: Seed of the projections.

    Returns:
      The transform.  Its ``update`` needs ``params`` if there is weight decay.  State is float32 for 16-bit parameters,
      where Optax keeps their dtype; complex parameters are refused.

    Raises:
      TypeError: See :func:`low_rank_projection`.
      ValueError: See :func:`low_rank_projection`; and where weight decay lacks parameters.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> tx = optim.apollo(1e-2, rank=2)
      >>> state = tx.init({"kernel": jax.numpy.ones((8, 4))})
      >>> state[0].mu["kernel"].shape
      (8, 2)
    """
    _checks.check_choice("scaling", scaling, ("channel", "tensor"))
    project = _random_projection(seed)
    return _apollo(
        project,
        learning_rate,
        rank,
        refresh_every=refresh_every,
        scaling=scaling,
        scale=scale,
        scale_front=scale_front,
        limiter=limiter,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        staggered=staggered,
        axes=axes,
        seed=seed,
    )


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 128.0,
    weight_decay: ArrayLike = 0.0,
    axes: AxesRule | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: :func:`apollo` of rank 1 with one factor for each matrix, nearly the memory of SGD.

    Args:
      learning_rate: Number, or schedule of the step.
      refresh_every: Steps for which one projection serves.
      scale: The gradient is multiplied by its root.
      weight_decay: Decoupled, after the step.
      axes: Rows and columns of leaves.
      seed: Seed of the projections.

    Returns:
      The transform; see :func:`apollo`.

    Raises:
      TypeError: See :func:`apollo`.
      ValueError: See :func:`apollo`.
    """
    return apollo(
        learning_rate,
        1,
        refresh_every=refresh_every,
        scaling="tensor",
        scale=scale,
        weight_decay=weight_decay,
        axes=axes,
        seed=seed,
    )


def _random_projection(seed):
    """Returns ``project(plan, g, period, at)``: a Gaussian projection that is the same all through a period.

    ``at`` is the number of the slice that ``g`` is of its leaf, None where it is the leaf.
    """

    def project(plan, g, period, at):
        *batch, m, n = g.shape
        size, dtype = n if plan.side == "right" else m, linalg.working_dtype(g)
        key = _projected.leaf_key(seed, plan, period)
        key = key if at is None else jax.random.fold_in(key, at)
        p = jax.random.normal(key, (*batch, size, plan.rank), dtype)
        p = p / jnp.sqrt(jnp.asarray(plan.rank, dtype))
        return _projected.project(Basis(right=p) if plan.side == "right" else Basis(left=p), g)

    return project


def _apollo(
    project,
    learning_rate,
    rank,
    *,
    refresh_every,
    scaling,
    scale,
    scale_front,
    limiter,
    b1,
    b2,
    eps,
    weight_decay,
    staggered=True,
    axes=None,
    seed=0,
):
    """:func:`apollo` with a given projection."""
    refresh_every = _checks.static_int("refresh_every", refresh_every, 1)
    _checks.check_number("scale", scale, 0)

    def step(plan, g, basis, mu, nu, norm, turns, count, at):
        del basis
        # Nothing is computed at a refresh, and a stack may have it as one.
        r = project(plan, g, (count + -turns[0] % refresh_every) // refresh_every, at)
        mu, nu, n = _adam.moments(r, mu, nu, b1, b2, eps)
        if scaling == "channel":
            ratio = _channel_ratio(plan, n, r)
        else:
            ratio = _norm(n, (-2, -1)) / (_norm(r, (-2, -1)) + _GUARD)
        d, root = g.astype(r.dtype) * ratio, jnp.sqrt(jnp.asarray(scale).astype(r.dtype))
        d = d * root if scale_front else d
        if limiter:
            d, norm = _limit(d, norm, count)
        return d if scale_front else d * root, mu, nu, norm

    scaled = _scaled_gradients(step, rank, refresh_every, staggered, axes, seed, b1, b2, eps, limiter=limiter)
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay))


def _sum_of_squares(x, axes):
    return jnp.sum(jnp.square(x), axis=axes, keepdims=True)


def _norm(x, axes):
    return jnp.sqrt(_sum_of_squares(x, axes))


def _low_rank_axis(plan):
    """Axis of a projected gradient that has the rank: its other one is that of the channels."""
    return -1 if plan.side == "right" else -2


def _channel_ratio(plan, n, r):
    """``||N|| / ||R||`` along the low-rank axis: for each column on the left, for each row on the right."""
    axis = _low_rank_axis(plan)
    return _norm(n, axis) / (_norm(r, axis) + _GUARD)


def _limiter(now, norm, count):
    """What to divide a step of norm ``now [..., 1, 1]`` by, so that it grows by 1% at most."""
    factor = jnp.maximum(now / (norm[..., None, None] + _GUARD), _GROWTH) / _GROWTH
    return jnp.where(count == 0, 1, factor)


def _limit(d, norm, count):
    """Shrinks ``d`` where its norm grew too much; returns the new norm too."""
    now = _norm(d, (-2, -1))
    factor = _limiter(now, norm, count)
    return d / factor, (now / factor)[..., 0, 0]


def _scaled_gradients(step, rank, refresh_every, staggered, axes, seed, b1, b2, eps, *, renewed=None, limiter=True):
    """A transform that steps projected leaves by ``step``, and all others by Adam.

    ``step(plan, g, basis, mu, nu, norm, turns, count, at) -> (D, mu, nu, norm)`` is for a leaf ``g [m, n]``, or for
    the slice ``at`` of a stack along its first axis; ``turns`` are those of the leaf's slices.  Bases, of the whole
    leaf, come from ``renewed(plan, g, basis, turns, count)``; without it there are none.
    """
    _projected.check_rank(rank)
    _checks.check_moments(b1, b2, eps)
    _checks.check_rule("axes", axes)
    _checks.static_int("seed", seed, 0)
    refresh_every = _checks.static_int("refresh_every", refresh_every, 1)

    def init(params):
        _checks.check_real(params)
        plans, structure = _projected.plans_for(params, rank, "std", axes)
        leaves, columns = jax.tree.leaves(params), []
        for plan, x in zip(plans, leaves, strict=True):
            if plan is None:
                zeros = jnp.zeros_like(x, linalg.working_dtype(x))
                columns.append((Basis(), zeros, jnp.zeros_like(zeros), _projected.absent(x)))
                continue
            basis, low = _projected.zero_state(plan, x)
            columns.append((basis, low, jnp.zeros_like(low), _projected.zero_per_matrix(plan, x)))
        bases, *trees = ([row[i] for row in columns] for i in range(4))
        mu, nu, norm = map(structure.unflatten, trees)
        sides = _projected.put_bases(_projected.no_bases(structure, leaves), bases, structure) if renewed else None
        return ScaledGradientState(jnp.zeros((), jnp.int32), sides, mu, nu, norm if limiter else None)

    def update(updates, state, params=None):
        del params
        plans, structure = _projected.plans_for(updates, rank, "std", axes)
        leaves, count = jax.tree.leaves(updates), state.count
        bases = _projected.bases_in(state.sides, plans, structure) if renewed else [Basis()] * len(leaves)
        kept = (state.mu, state.nu, *([state.norm] if limiter else []))
        columns = [structure.flatten_up_to(tree) for tree in kept]
        rows = zip(bases, *columns, *([] if limiter else [[None] * len(leaves)]), strict=True)
        turns = _projected.turns_of(plans, refresh_every, staggered)
        next_count, results = optax.safe_increment(count), []

        for plan, own_turns, g, old in zip(plans, turns, leaves, rows, strict=True):
            if plan is None:
                basis, mu, nu, norm = old
                mu, nu, n = _adam.moments(g.astype(mu.dtype), mu, nu, b1, b2, eps)
                d = (_adam.correction(next_count, b1, b2, n.dtype) * n).astype(g.dtype)
                results.append((d, basis, mu, nu, norm))
                continue

            def run(g, old, count, plan=plan, turns=own_turns):
                x, (basis, *moments) = _projected.to_matrices(plan, g), old
                if renewed:
                    basis = renewed(plan, x, basis, turns, count)

                def one(at, basis, own):
                    d, *new = step(plan, *_adam.bounded(own[0]), basis, *own[1:], turns, count, at)
                    return ((_adam.correction(count + 1, b1, b2, d.dtype) * d).astype(g.dtype), *new)

                # What Fira makes of a gradient is of its size, in float32: one layer of a stack at a time.
                own = (x, *moments)
                d, *new = one(None, basis, own) if x.ndim == 2 else _projected.slice_by_slice(one, basis, own)
                return _projected.from_matrices(plan, d, g.shape), (basis, *new)

            specs = lambda g=g, old=old: (_projected.spec_of(g), _projected.spec_of(old))  # noqa: E731
            d, new = _projected.automatic(run, (g, old, count), specs)
            results.append((d, *new))

        d, bases, *trees = ([row[i] for row in results] for i in range(5))
        mu, nu, norm = map(structure.unflatten, trees)
        sides = _projected.put_bases(state.sides, bases, structure) if renewed else None
        return structure.unflatten(d), ScaledGradientState(next_count, sides, mu, nu, norm if limiter else None)

    return optax.GradientTransformation(init, update)
