"""Online Subspace Descent: the projection of GaLore follows the gradients by online PCA (arXiv 2408.12857)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._basis import Basis, bases_of, project, project_back
from subspace_jax.optim.projected._map import map_projected
from subspace_jax.optim.projected._plan import plans_for, zero_state
from subspace_jax.optim.projected._refresh import new_basis
from subspace_jax.optim.projected.options import ProjectionOptions, RankRule, check_rank, checked

PyTree = Any

_TRACKERS = ("adamw", "sgd")
# AdamW of the tracker, as in the reference code.
_B1, _B2, _EPS, _DECAY = 0.9, 0.999, 1e-8, 0.01


class OnlineSubspaceState(NamedTuple):
    """State of :func:`online_subspace_descent`; ``optax.MaskedNode`` stands for leaves that are not projected.

    Attributes:
      count: Steps taken, int32 scalar.
      sides: Left and right bases, two trees like the parameters, orthonormal at the first step only; ``[1]`` where a
        leaf has none of that side.
      mu: First moments of projected gradients.
      nu: Second moments.
      tracker_mu: First moments of the PCA's gradients, like ``sides``; None for the tracker "sgd".
      tracker_nu: Second moments.
      fallback: State of Adam for other leaves.
    """

    count: jax.Array
    sides: Basis
    mu: PyTree
    nu: PyTree
    tracker_mu: Basis | None
    tracker_nu: Basis | None
    fallback: optax.OptState

    @property
    def bases(self) -> PyTree:
        """Tree like the parameters, of :class:`Basis`: None for a side on which a leaf isn't projected."""
        return bases_of(self.sides)


def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    *,
    refresh_every: int = 200,
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
    ``relative_rate / refresh_every``.  State of a kernel: that of :func:`galore`, and two more bases with "adamw".

    Args:
      learning_rate: Fixed learning rate or schedule.
      rank: See :func:`low_rank_projection`.
      refresh_every: Steps in which other methods would refresh the basis; its learning rate is the inverse.
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
    check_rank(rank)
    options = checked(ProjectionOptions(refresh_every=refresh_every, method="svd"))
    _checks.check_choice("tracker", tracker, _TRACKERS)
    _checks.check_number("scale", scale, 0)
    _checks.check_rate("relative_rate", relative_rate, 0)
    _checks.check_moments(b1, b2, eps)

    def leaf_init(plan, x):
        basis, low = zero_state(plan, x)
        # Each of arrays of its own, which a step may donate.
        trackers = [jax.tree.map(jnp.zeros_like, basis) if tracker == "adamw" else None for _ in range(2)]
        return basis, low, jnp.zeros_like(low), *trackers

    def leaf_step(plan, count, g, entries):
        basis, mu, nu, first, second = entries
        side = "left" if plan.side == "left" else "right"

        def start():
            return new_basis(plan, options, jax.random.key(0), count == 0, g, basis)

        basis = jax.lax.cond(count == 0, start, lambda: basis)
        mu, nu, n = _adam.moments(project(basis, g), mu, nu, b1, b2, eps)
        d = jnp.asarray(scale).astype(n.dtype) * project_back(basis, n)

        p = getattr(basis, side)
        slope = _pca_gradient(p, (g if side == "left" else g.mT).astype(mu.dtype))
        now = relative_rate(count) if callable(relative_rate) else relative_rate
        rate = jnp.asarray(now).astype(p.dtype) / options.refresh_every
        if tracker == "sgd":
            moved = p - rate * slope
        else:
            m, v, moved = _tracked(p, slope, getattr(first, side), getattr(second, side), rate, count)
            first, second = Basis(**{side: m}), Basis(**{side: v})
        # The first step's basis is the SVD's own.
        basis = Basis(**{side: jnp.where(count == 0, p, moved)})
        return _adam.correction(count + 1, b1, b2, d.dtype) * d, (basis, mu, nu, first, second)

    plans = functools.partial(plans_for, rank=rank, options=options)
    tx = map_projected(OnlineSubspaceState, leaf_init, leaf_step, plans, _adam.scale_by_plain_adam(b1, b2, eps))
    return _adam.then_descend(tx, learning_rate, weight_decay)


def _pca_gradient(p, a):
    """The gradient of ``||P P^T A - A||^2`` for ``A`` brought to norm 1."""
    size = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True)
    a = a / jnp.where(size > 0, size, 1)
    # With E = P P^T A - A, matmuls with r columns only: A^T P, E^T P and A (E^T P), E (A^T P).
    low = linalg.gram(a, p)
    error = linalg.times(low, linalg.gram(p, p)) - low
    return 2 * (linalg.times(p, linalg.gram(low, low)) - linalg.times(a, low) + linalg.times(a, error))


def _tracked(p, slope, first, second, rate, count):
    """A step of AdamW for the basis, whose counter starts at the second step."""
    m, v = _B1 * first + (1 - _B1) * slope, _B2 * second + (1 - _B2) * jnp.square(slope)
    t = jnp.maximum(count, 1).astype(p.dtype)
    step = m / (1 - _B1**t) / (jnp.sqrt(v / (1 - _B2**t)) + _EPS)
    return *(jnp.where(count > 0, x, 0) for x in (m, v)), p * (1 - rate * _DECAY) - rate * step
