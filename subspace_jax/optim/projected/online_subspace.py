"""Online Subspace Descent: the projection of GaLore follows the gradients by online PCA (arXiv 2408.12857)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _checks
from subspace_jax.optim.projected import _adam
from subspace_jax.optim.projected import _shared as _projected
from subspace_jax.optim.projected._shared import Basis, RankRule

PyTree = Any

_TRACKERS = ("adamw", "sgd")
# AdamW of the tracker, as in the reference code.
_B1, _B2, _EPS, _DECAY = 0.9, 0.999, 1e-8, 0.01


class OnlineSubspaceState(NamedTuple):
    """State of :func:`online_subspace_descent`; trees like the parameters.

    Attributes:
      count: Steps taken, int32 scalar.
      sides: Left and right bases, two trees like the parameters, no longer quite orthonormal; ``[1]`` where a leaf has
        none of that side.
      mu: First moments of projected gradients; of gradients where leaves are not projected.
      nu: Second moments.
      tracker_mu: First moments of the PCA's gradients, like ``sides``; None for the tracker "sgd".
      tracker_nu: Second moments.
    """

    count: jax.Array
    sides: Basis
    mu: PyTree
    nu: PyTree
    tracker_mu: Basis | None
    tracker_nu: Basis | None

    @property
    def bases(self) -> PyTree:
        """Tree like the parameters, of :class:`Basis`: None for a side on which a leaf isn't projected."""
        return _projected.bases_of(self.sides)


def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    *,
    period: int = 200,
    scale: ArrayLike = 0.25,
    tracker: str = "adamw",
    relative_rate: optax.ScalarOrSchedule = 1.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Online Subspace Descent (Liang et al., arXiv 2408.12857): Adam in a subspace that learns, without refreshes.

    The shorter side is projected.  The basis comes from one SVD at the first step; each step is taken with the basis
    as it is, which then moves against the gradient of ``||P P^T G - G||^2`` for ``G`` of norm 1, at the rate
    ``relative_rate / period``.  State of a kernel: that of :func:`galore`, and two more bases with "adamw".

    Args:
      learning_rate: Number, or schedule of the step.
      rank: See :func:`low_rank_projection`.
      period: Steps in which the basis would be renewed by other methods; its learning rate is the inverse.
      scale: Factor on updates of projected leaves.
      tracker: What steps the basis: "adamw" or "sgd".
      relative_rate: Learning rate at a step over that at the start, which the rate of the basis follows.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, before bias correction.
      weight_decay: Decoupled, after the step.

    Returns:
      The transform.  Its ``update`` needs ``params`` if there is weight decay.  State is float32 for 16-bit parameters,
      where Optax keeps their dtype; complex parameters are refused.

    Raises:
      TypeError: See :func:`low_rank_projection`.
      ValueError: ``tracker`` is unknown, or a number out of range; and where weight decay lacks parameters.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> tx = optim.online_subspace_descent(1e-2, rank=2)
      >>> state = tx.init({"kernel": jax.numpy.ones((8, 4))})
    """
    _projected.check_rank(rank)
    period = _checks.static_int("period", period, 1)
    _checks.check_choice("tracker", tracker, _TRACKERS)
    _checks.check_number("scale", scale, 0)
    _checks.check_rate("relative_rate", relative_rate, 0)
    _checks.check_moments(b1, b2, eps)
    descent = _adam.descend(learning_rate, weight_decay)

    def init(params):
        _checks.check_real(params)
        plans, structure = _projected.plans_for(params, rank, "std")
        leaves, rows = jax.tree.leaves(params), []
        for plan, x in zip(plans, leaves, strict=True):
            if plan is None:
                basis, low = Basis(), jnp.zeros_like(x, linalg.working_dtype(x))
            else:
                basis, low = _projected.zero_state(plan, x)
            rows.append((basis, low))
        bases, lows = ([row[i] for row in rows] for i in range(2))
        # Each of arrays of its own, which a step may donate.
        kept = [
            _projected.put_bases(_projected.no_bases(structure, leaves), jax.tree.map(jnp.zeros_like, bases), structure)
            for _ in range(3 if tracker == "adamw" else 1)
        ]
        mu, nu = (structure.unflatten([jnp.zeros_like(x) for x in lows]) for _ in range(2))
        trackers = kept[1:] if tracker == "adamw" else (None, None)
        return OnlineSubspaceState(jnp.zeros((), jnp.int32), kept[0], mu, nu, *trackers)

    def leaf(plan, g, count, basis, mu, nu, first, second):
        wide = plan.side == "left"
        side = "left" if wide else "right"

        def start():
            return _projected.new_basis(plan, g, basis, "svd", jax.random.key(0), count == 0, 1)

        basis = jax.lax.cond(count == 0, start, lambda: basis)
        mu, nu, n = _adam.moments(_projected.project(basis, g), mu, nu, b1, b2, eps)
        d = jnp.asarray(scale).astype(n.dtype) * _projected.back(basis, n)

        a, p = g.astype(mu.dtype), getattr(basis, side)
        a = a if wide else a.mT
        size = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)
        a = a / jnp.where(size > 0, size, 1)
        # With E = P P^T A - A, products of r columns only: A^T P, E^T P and A (E^T P), E (A^T P).
        low = linalg.gram(a, p)
        error = linalg.times(low, linalg.gram(p, p)) - low
        slope = linalg.times(p, linalg.gram(low, low)) - linalg.times(a, low) + linalg.times(a, error)
        moved, first, second = track(p, 2 * slope, first, second, side, count)
        # The first step's basis is the SVD's own.
        fresh = count == 0
        return d, Basis(**{side: jnp.where(fresh, p, moved)}), mu, nu, first, second

    def track(p, slope, first, second, side, count):
        now = relative_rate(count) if callable(relative_rate) else relative_rate
        rate = jnp.asarray(now).astype(p.dtype) / period
        if tracker == "sgd":
            return p - rate * slope, first, second
        # The counter of the tracker starts at the second step.
        taken = count > 0
        m = _B1 * getattr(first, side) + (1 - _B1) * slope
        v = _B2 * getattr(second, side) + (1 - _B2) * jnp.square(slope)
        t = jnp.maximum(count, 1).astype(p.dtype)
        step = m / (1 - _B1**t) / (jnp.sqrt(v / (1 - _B2**t)) + _EPS)
        first, second = (Basis(**{side: jnp.where(taken, new, 0)}) for new in (m, v))
        return p * (1 - rate * _DECAY) - rate * step, first, second

    def update(updates, state, params=None, **extra_args):
        del extra_args
        plans, structure = _projected.plans_for(updates, rank, "std")
        leaves, nothing = jax.tree.leaves(updates), [Basis()] * len(plans)
        bases, first, second = (
            nothing if sides is None else _projected.bases_in(sides, plans, structure)
            for sides in (state.sides, state.tracker_mu, state.tracker_nu)
        )
        moments = (structure.flatten_up_to(tree) for tree in (state.mu, state.nu))
        results = []
        for plan, g, *old in zip(plans, leaves, bases, *moments, first, second, strict=True):

            def run(g, count, old, plan=plan):
                if plan is None:
                    mu, nu, d = _adam.moments(g.astype(old[1].dtype), *old[1:3], b1, b2, eps)
                    new = (old[0], mu, nu, *old[3:])
                else:
                    d, *new = leaf(plan, _projected.to_matrices(plan, g), count, *old)
                    d = _projected.from_matrices(plan, d, g.shape)
                d = _adam.correction(count + 1, b1, b2, d.dtype) * d
                return d.astype(g.dtype), tuple(new)

            specs = lambda g=g, old=old: (_projected.spec_of(g), _projected.spec_of(tuple(old)))  # noqa: E731
            d, new = _projected.automatic(run, (g, state.count, tuple(old)), specs)
            results.append((d, *new))
        d, bases, mu, nu, first, second = ([row[i] for row in results] for i in range(6))
        d, after = descent.update(structure.unflatten(d), _adam.DescentState(state.count), params)
        sides, first, second = (
            None if old is None else _projected.put_bases(old, new, structure)
            for old, new in ((state.sides, bases), (state.tracker_mu, first), (state.tracker_nu, second))
        )
        return d, OnlineSubspaceState(after.count, sides, *map(structure.unflatten, (mu, nu)), first, second)

    return optax.GradientTransformationExtraArgs(init, update)
