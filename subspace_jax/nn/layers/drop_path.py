"""Stochastic depth: residual branches dropped at random in training."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def drop_path(key: jax.Array | None, branch: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Sets a residual branch to zero for random examples, and scales it for the others so that its mean stays.

    Args:
      key: Random key; None returns the branch unchanged, for evaluation.
      branch: ``[batch, ...]``, floating point.
      rate: Probability that an example loses the branch, in [0, 1); a float32 scalar where it is traced, as in a scan.

    Returns:
      The shape and dtype of ``branch``.

    Raises:
      ValueError: ``rate`` is out of range.

    Source: Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382).
    """
    traced = isinstance(rate, jax.Array)
    if not traced and not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1), got {rate}")
    if key is None or (not traced and rate == 0):
        return branch
    keep = 1 - rate
    kept = jax.random.bernoulli(key, keep, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    keep = keep.astype(branch.dtype) if traced else keep
    return jnp.where(kept, branch / keep, jnp.zeros_like(branch))


def drop_path_rates(rate: float, blocks: int) -> tuple[float, ...]:
    """Returns rates that grow linearly with depth, from 0 at the first block to ``rate`` at the last."""
    return tuple(rate * i / max(blocks - 1, 1) for i in range(blocks))


def drop_path_keys(key: jax.Array | None, train: bool, rate: float, blocks: int) -> Sequence[jax.Array | None]:
    """Returns a random key for each block; None for each outside training or where the rate is 0.

    Raises:
      ValueError: A key is needed and missing.
    """
    if not train or rate == 0:
        return [None] * blocks
    if key is None:
        raise ValueError(f"key: a random key is needed to train with drop_path = {rate}, got None")
    return list(jax.random.split(key, blocks))
