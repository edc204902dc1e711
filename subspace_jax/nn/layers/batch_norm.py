"""Batch normalization with running statistics, as a pure function."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    *,
    train: bool = False,
    eps: float = 1e-5,
    momentum: float = 0.9,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Batch normalization (Ioffe and Szegedy, arXiv 1502.03167) by running statistics or by those of the batch.

    Under ``jit`` the statistics are those of the global batch; under ``shard_map`` they are averaged over
    ``axis_name``.  They are computed in at least float32.

    Mean and variance take two passes: the rounded mean c first, then ``E[d]`` and ``E[d^2] - E[d]^2`` with
    ``d = x - c``, so that no digits are lost however far the batch is from 0 or from the running mean.  The backward
    pass is that of a variance in one pass.

    Args:
      x: ``[batch, ..., channels]``, floating point.
      scale: ``[channels]``.
      bias: ``[channels]``.
      mean: Running mean ``[channels]``.
      var: Running variance ``[channels]``.
      train: Whether to normalize by the batch and to update the running statistics.
      eps: Added to the variance.
      momentum: Weight of the old running statistics.
      axis_name: Mesh axes over which the batch is sharded, inside ``shard_map``.

    Returns:
      ``y`` in the shape and dtype of ``x``, and running mean and variance.  The batch is normalized by its biased
      variance ``sum / n``; the running variance takes the unbiased one, ``sum / (n - 1)``, as in PyTorch.

    Raises:
      ValueError: Channels differ, or a training batch has one value per channel.
    """
    if any(p.shape != x.shape[-1:] for p in (scale, bias, mean, var)):
        raise ValueError(
            f"batch_norm: x {x.shape} has {x.shape[-1]} channels; got scale {scale.shape}, bias {bias.shape}, "
            f"mean {mean.shape}, var {var.shape}"
        )
    wide = working_dtype(x)
    lead = (1,) * (x.ndim - 1)

    def along(parameter: jax.Array) -> jax.Array:
        return parameter.astype(wide).reshape(*lead, -1)

    shift, center, spread, statistics = mean, jnp.zeros_like(mean, wide), var, (mean, var)
    if train:
        count = x.size // x.shape[-1]
        if axis_name is not None:
            count *= jax.lax.axis_size(axis_name)
        if count < 2:
            raise ValueError(f"batch_norm: expected more than one value per channel to train on, got x {x.shape}")
        axes = tuple(range(x.ndim - 1))

        def over_batch(means):
            return means if axis_name is None else jax.lax.pmean(means, axis_name)

        # A constant for derivatives: the result does not depend on the shift.
        shift = over_batch(jnp.mean(jax.lax.stop_gradient(x).astype(wide), axes))
        shifted = x.astype(wide) - along(shift)
        center, square = over_batch(jnp.stack([jnp.mean(shifted, axes), jnp.mean(jnp.square(shifted), axes)]))
        spread = jnp.maximum(square - jnp.square(center), 0)
        new = (shift + center, spread * (count / (count - 1)))
        statistics = tuple(
            (momentum * old.astype(wide) + (1 - momentum) * jax.lax.stop_gradient(now)).astype(old.dtype)
            for old, now in zip((mean, var), new, strict=True)
        )
    factor = scale.astype(wide) * jax.lax.rsqrt(spread.astype(wide) + eps)
    y = (x.astype(wide) - along(shift) - along(center)) * along(factor) + along(bias)
    return y.astype(x.dtype), statistics
