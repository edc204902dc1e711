"""GaLore: Adam, or any other transform, on low-rank projections of the gradients (arXiv 2403.03507)."""

import optax
from jax.typing import ArrayLike

from subspace_jax.optim import _adam, _checks
from subspace_jax.optim.projected.options import ProjectionOptions, RankRule, WeightDimensionNumbers
from subspace_jax.optim.projected.projection import low_rank_projection


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | RankRule = 128,
    *,
    side: str = "std",
    refresh_every: int = 200,
    method: str = "subspace_iteration",
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    inner: optax.GradientTransformation | None = None,
    rounds: int = 2,
    moments: str = "keep",
    staggered: bool = True,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore (Zhao et al., arXiv 2403.03507), with Adam or another transform inside.

    The step is ``W <- (W - lr scale P N) (1 - lr weight_decay)``, with ``N`` Adam's direction for ``P^T G``.  State of
    an ``m x n`` kernel: the basis, ``min(m, n) r`` entries, and twice ``max(m, n) r`` for "std".

    Args:
      learning_rate: Fixed learning rate or schedule.
      rank: See :func:`low_rank_projection`.
      side: This and other arguments: see :class:`ProjectionOptions`.
      refresh_every: Steps between refreshes.
      method: How bases are computed; "svd" is that of the paper.
      scale: Factor on updates of projected leaves, the paper's alpha.
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Added to the root of the second moment, before bias correction.
      weight_decay: Decoupled, after the step, for all leaves.
      inner: A transform that gives directions of ascent, such as ``optax.scale_by_factored_rms()``, instead of Adam.
      rounds: Rounds of a subspace iteration.
      moments: What happens to moments at a refresh.
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
      >>> tx = optim.galore(1e-2, rank=lambda path, shape: shape[-1] // 4 if path.endswith("kernel") else None)
      >>> state = tx.init({"kernel": jax.numpy.ones((8, 4)), "bias": jax.numpy.ones(4)})
      >>> state[0].inner.mu["kernel"].shape
      (8, 1)
    """
    options = ProjectionOptions(side, refresh_every, method, rounds, moments, staggered, weight_dimension_numbers, seed)
    projected = scale_by_galore(rank, options, scale=scale, b1=b1, b2=b2, eps=eps, inner=inner)
    return optax.chain(projected, _adam.descend(learning_rate, weight_decay))


def scale_by_galore(
    rank: int | RankRule = 128,
    projection: ProjectionOptions | None = None,
    *,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The directions of :func:`galore`, positive ascends, for use in a chain.

    Args:
      rank: See :func:`low_rank_projection`.
      projection: How gradients are projected.
      scale: This and other arguments: see :func:`galore`.
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Added to the root of the second moment.
      inner: A transform instead of Adam.

    Returns:
      The transform.

    Raises:
      TypeError: See :func:`low_rank_projection`.
      ValueError: See :func:`low_rank_projection`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> tx = optax.chain(optim.scale_by_galore(rank=4), optax.add_decayed_weights(0.1), optax.scale(-1e-2))
    """
    _checks.check_moments(b1, b2, eps)
    if inner is not None:
        _checks.check_transform("inner", inner)
    adam = _adam.scale_by_plain_adam(b1, b2, eps)
    return low_rank_projection(adam if inner is None else inner, rank, projection, scale=scale, leafwise=inner is None)
