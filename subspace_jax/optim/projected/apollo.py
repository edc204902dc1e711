"""APOLLO: gradients scaled by what Adam does to a random projection of them (arXiv 2412.05270)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._basis import Basis, project
from subspace_jax.optim.projected._refresh import leaf_key
from subspace_jax.optim.projected._scaled_gradient import GUARD, channel_ratio, limit, norm_of, scale_gradients
from subspace_jax.optim.projected.options import ProjectionOptions, RankRule, WeightDimensionNumbers


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
    weight_dimension_numbers: WeightDimensionNumbers = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO (Zhu et al., arXiv 2412.05270): gradients scaled by what Adam does to a random projection of them.

    The projection has entries of variance ``1 / r`` and is drawn from the seed at every step, so that it takes no
    memory: the state of an ``m x n`` kernel is ``2 max(m, n) r`` entries, and one norm for the limiter.

    Args:
      learning_rate: Fixed learning rate or schedule.
      rank: See :func:`low_rank_projection`.
      refresh_every: Steps for which a projection stays the same.
      scaling: "channel" (one factor for each row or column of the longer side) or "tensor" (one for each matrix).
      scale: The gradient is multiplied by its root.
      scale_front: Whether ``scale`` applies before the limiter instead of after it.
      limiter: Whether the norm of the step may grow by 1% only from step to step.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, before bias correction.
      weight_decay: Decoupled, after the step.
      staggered: Whether projections of leaves change in turns.
      weight_dimension_numbers: See :class:`ProjectionOptions`.
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
    _checks.check_number("scale", scale, 0)
    options = ProjectionOptions(
        refresh_every=refresh_every,
        staggered=staggered,
        weight_dimension_numbers=weight_dimension_numbers,
        seed=seed,
    )
    scaled = scale_gradients(
        apollo_step(random_projection(seed), refresh_every, scaling, scale, scale_front, limiter, (b1, b2, eps)),
        rank,
        options,
        (b1, b2, eps),
        with_bases=False,
        limiter=limiter,
    )
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay))


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    refresh_every: int = 200,
    scale: ArrayLike = 128.0,
    weight_decay: ArrayLike = 0.0,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: :func:`apollo` of rank 1 with one factor for each matrix, nearly the memory of SGD.

    Args:
      learning_rate: Fixed learning rate or schedule.
      refresh_every: This and other arguments: see :func:`apollo`.
      scale: The gradient is multiplied by its root.
      weight_decay: Decoupled, after the step.
      weight_dimension_numbers: Rows and columns of leaves.
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
        weight_dimension_numbers=weight_dimension_numbers,
        seed=seed,
    )


def random_projection(seed: int) -> Callable:
    """Returns ``project(plan, g, period, at)``: a Gaussian projection that is the same all through a period.

    ``at`` is the number of the slice that ``g`` is of its leaf, None for the whole leaf.
    """

    def projected(plan, g, period, at):
        *batch, m, n = g.shape
        size, dtype = n if plan.side == "right" else m, linalg.working_dtype(g)
        key = leaf_key(seed, plan, period)
        key = key if at is None else jax.random.fold_in(key, at)
        p = jax.random.normal(key, (*batch, size, plan.rank), dtype)
        p = p / jnp.sqrt(jnp.asarray(plan.rank, dtype))
        return project(Basis(right=p) if plan.side == "right" else Basis(left=p), g)

    return projected


def apollo_step(
    projected: Callable,
    refresh_every: int,
    scaling: str,
    scale: ArrayLike,
    scale_front: bool,
    limiter: bool,
    adam: tuple[ArrayLike, ArrayLike, ArrayLike],
) -> Callable:
    """The step of a leaf, see :func:`apollo`; ``projected(plan, g, period, at)`` returns the projected gradient."""

    def step(plan, count, at, g, basis, moments):
        mu, nu, norm = moments
        del basis
        # Nothing is computed at a refresh, so that all of a stack may have it at once.
        r = projected(plan, g, (count + -plan.turns[0] % refresh_every) // refresh_every, at)
        mu, nu, n = _adam.moments(r, mu, nu, *adam)
        if scaling == "channel":
            ratio = channel_ratio(plan, n, r)
        else:
            ratio = norm_of(n, (-2, -1)) / (norm_of(r, (-2, -1)) + GUARD)
        d, root = g.astype(r.dtype) * ratio, jnp.sqrt(jnp.asarray(scale).astype(r.dtype))
        d = d * root if scale_front else d
        if limiter:
            now = norm_of(d, (-2, -1))
            divisor = limit(now, norm, count)
            d, norm = d / divisor, (now / divisor)[..., 0, 0]
        return d if scale_front else d * root, mu, nu, norm

    return step
