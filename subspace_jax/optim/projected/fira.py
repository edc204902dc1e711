"""Fira: GaLore with the residual of the projection, scaled as Adam would scale it (arXiv 2410.01623)."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._basis import project, project_back
from subspace_jax.optim.projected._scaled_gradient import channel_ratio, limit, low_rank_axis, scale_gradients
from subspace_jax.optim.projected.options import ProjectionOptions, RankRule, WeightDimensionNumbers


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
    weight_dimension_numbers: WeightDimensionNumbers = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Fira (Chen et al., arXiv 2410.01623): GaLore, and the residual of the gradient, scaled as Adam would.

    The residual ``G - scale P R`` of a kernel is multiplied, channel by channel of the longer side, by
    ``||N|| / ||R||``, and its norm may grow by 1% from step to step.  State as for :func:`galore`, and one norm.

    Args:
      learning_rate: Fixed learning rate or schedule.
      rank: See :func:`low_rank_projection`.
      refresh_every: This and other arguments: see :class:`ProjectionOptions`.
      method: How bases are computed; "svd" is that of the paper.
      scale: Factor on the low-rank part of the step, and on what the residual leaves out.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, before bias correction.
      weight_decay: Decoupled, after the step.
      rounds: Rounds of a subspace iteration.
      staggered: Whether leaves are refreshed in turns.
      weight_dimension_numbers: Rows and columns of leaves.
      seed: Random seed.

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
    _checks.check_number("scale", scale, 0)

    def step(plan, count, at, g, basis, moments):
        mu, nu, norm = moments
        del at
        r = project(basis, g)
        mu, nu, n = _adam.moments(r, mu, nu, b1, b2, eps)
        alpha, g = jnp.asarray(scale).astype(r.dtype), g.astype(r.dtype)
        ratio = channel_ratio(plan, n, r)
        # P has orthonormal columns: ||G - scale P R||^2 is ||G||^2 - scale (2 - scale) ||R||^2, channel by channel,
        # and the step is one matmul with P.  The difference cancels only where next to nothing is left to limit.
        squares_g, squares_r = (jnp.sum(jnp.square(x), axis=low_rank_axis(plan), keepdims=True) for x in (g, r))
        rest = squares_g - alpha * (2 - alpha) * squares_r
        now = jnp.sqrt(jnp.sum(jnp.square(ratio) * jnp.maximum(rest, 0), axis=(-2, -1), keepdims=True))
        divisor = limit(now, norm, count)
        share = ratio / divisor
        return g * share + alpha * project_back(basis, n - r * share), mu, nu, (now / divisor)[..., 0, 0]

    options = ProjectionOptions(
        refresh_every=refresh_every,
        method=method,
        rounds=rounds,
        staggered=staggered,
        weight_dimension_numbers=weight_dimension_numbers,
        seed=seed,
    )
    scaled = scale_gradients(step, rank, options, (b1, b2, eps), with_bases=True)
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay))
