"""Stochastic depth: residual branches that are left out at random while a model is trained."""

import jax
import jax.numpy as jnp


def drop_path(key: jax.Array | None, branch: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Sets a residual branch to zero for a share of the examples, and scales up the others so that the mean stays.

    Args:
      key: Random key; None leaves the branch as it is, for evaluation.
      branch: ``[batch, ...]``, floating point.
      rate: Share of the examples that lose the branch, in [0, 1); a float32 scalar where it is traced, as in a scan.

    Returns:
      The shape and dtype of ``branch``.

    Raises:
      ValueError: ``rate`` is a number out of range.

    Source: Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382).
    """
    traced = isinstance(rate, jax.Array)
    if not traced and not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1), got {rate}")
    if key is None or (not traced and rate == 0):
        return branch
    share = 1 - rate
    kept = jax.random.bernoulli(key, share, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    share = share.astype(branch.dtype) if traced else share
    return jnp.where(kept, branch / share, jnp.zeros_like(branch))


def drop_path_rates(rate: float, blocks: int) -> tuple[float, ...]:
    """Rates that grow linearly with depth, from 0 at the first block to ``rate`` at the last."""
    return tuple(rate * i / max(blocks - 1, 1) for i in range(blocks))
