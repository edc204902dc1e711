"""Gradients of full rank, scaled by what Adam does to their low-rank projections: Fira and APOLLO."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._basis import Basis, bases_of
from subspace_jax.optim.projected._map import map_projected
from subspace_jax.optim.projected._plan import LeafPlan, plans_for, zero_per_matrix, zero_state
from subspace_jax.optim.projected._refresh import refresh_basis, slice_by_slice
from subspace_jax.optim.projected.options import ProjectionOptions, RankRule, check_rank, checked

PyTree = Any

# Growth of a norm from one step to the next that the limiter lets pass, and the guard of its quotients.
_GROWTH, GUARD = 1.01, 1e-8


class ScaledGradientState(NamedTuple):
    """State of :func:`fira` and :func:`apollo`; ``optax.MaskedNode`` stands for leaves that are not projected.

    Attributes:
      count: Steps taken, int32 scalar.
      sides: Left and right bases, two trees like the parameters, ``[1]`` where a leaf has none of that side; None for
        APOLLO, whose projections are drawn from the seed at every step.
      mu: First moments of projected gradients.
      nu: Second moments.
      norm: The norm that the limiter compares with, ``[...]`` for each stack; None without a limiter.
      fallback: State of Adam for other leaves.
    """

    count: jax.Array
    sides: Basis | None
    mu: PyTree
    nu: PyTree
    norm: PyTree
    fallback: optax.OptState

    @property
    def bases(self) -> PyTree:
        """Tree like the parameters, of :class:`Basis`: None for a side on which a leaf isn't projected."""
        return None if self.sides is None else bases_of(self.sides)


def scale_gradients(
    step: Callable[..., tuple],
    rank: int | RankRule,
    options: ProjectionOptions,
    adam: tuple,
    *,
    with_bases: bool,
    limiter: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """A transform that steps projected leaves by ``step``, and all others by Adam.

    Args:
      step: ``step(plan, count, at, g, basis, (mu, nu, norm)) -> (direction, mu, nu, norm)`` for a leaf ``g [m, n]``,
        or for the slice ``at`` of a stack along its first axis.
      rank: See :func:`low_rank_projection`.
      options: How gradients are projected.
      adam: ``(b1, b2, eps)``.
      with_bases: Whether bases are kept and refreshed.
      limiter: Whether norms are kept.
    """
    check_rank(rank)
    options = checked(options)
    _checks.check_moments(*adam)

    def leaf_init(plan, x):
        basis, low = zero_state(plan, x)
        norm = zero_per_matrix(plan, x) if limiter else None
        return basis if with_bases else None, low, jnp.zeros_like(low), norm

    def leaf_step(plan, count, g, entries):
        basis, *moments = entries
        if with_bases:
            basis = refresh_basis(plan, options, count, g, basis)

        def one(at, basis, old):
            g, *moments = old
            d, *new = step(plan, count, at, *_adam.bounded(g), basis, moments)
            return ((_adam.correction(count + 1, *adam[:2], d.dtype) * d).astype(g.dtype), *new)

        # Fira's temporaries are of the size of the gradient, in float32: one layer of a stack at a time.
        d, *moments = slice_by_slice(one, basis, (g, *moments))
        return d, (basis, *moments)

    plans = functools.partial(plans_for, rank=rank, options=options)
    return map_projected(ScaledGradientState, leaf_init, leaf_step, plans, _adam.scale_by_plain_adam(*adam))


def norm_of(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The root of the sum of squares, axes kept."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def low_rank_axis(plan: LeafPlan) -> int:
    """The axis of a projected gradient that has the rank; its other one is that of the channels."""
    return -1 if plan.side == "right" else -2


def channel_ratio(plan: LeafPlan, n: jax.Array, r: jax.Array) -> jax.Array:
    """``||N|| / ||R||`` along the low-rank axis: for each column on the left, for each row on the right."""
    axis = low_rank_axis(plan)
    return norm_of(n, axis) / (norm_of(r, axis) + GUARD)


def limit(now: jax.Array, norm: jax.Array, count: jax.Array) -> jax.Array:
    """Divisor of a step of norm ``now [..., 1, 1]`` with which the norm grows by 1% at most."""
    factor = jnp.maximum(now / (norm[..., None, None] + GUARD), _GROWTH) / _GROWTH
    return jnp.where(count == 0, 1, factor)
