"""The pool of low-rank experts that the tasks of a stream share: it grows, it is pruned, and it is frozen.

A reconstruction of iGSP from its abstract (arXiv 2605.19301).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg


class ExpertPool(NamedTuple):
    """Low-rank experts, padded to a fixed number; leading axes are layers.

    Attributes:
      a: ``[..., experts, d_in, rank]``.
      b: ``[..., experts, rank, d_out]``.
      active: ``[..., experts]`` bool, the slots that hold an expert.
      frozen: ``[..., experts]`` bool, the experts of earlier tasks, the historical ones.
      owner: ``[..., experts]`` int32, the task that added the expert; -1 for a free slot.
    """

    a: jax.Array
    b: jax.Array
    active: jax.Array
    frozen: jax.Array
    owner: jax.Array


class Pruned(NamedTuple):
    """A pool without the candidates that the router does not use.

    Attributes:
      pool: The pool.
      keep: ``[..., experts]`` bool, the experts that the task uses: the mask of its router.
    """

    pool: ExpertPool
    keep: jax.Array


class ParameterCounts(NamedTuple):
    """Parameters of experts, without routers: int32 ``[...]``, and of each task ``[..., tasks]``.

    Attributes:
      total: Parameters of all experts of the pool.
      historical: Those of historical experts.
      candidates: Those of candidates.
      per_task: Those that each task added, in the order of tasks.
    """

    total: jax.Array
    historical: jax.Array
    candidates: jax.Array
    per_task: jax.Array


def init_pool(key: jax.Array, max_experts: int, rank: int, d_in: int, d_out: int) -> ExpertPool:
    """Returns an empty pool with initial values in its free slots.

    Factors ``a`` are uniform within ``sqrt(6 / d_in)`` (He et al., arXiv 1502.01852), factors ``b`` zero, so that a new
    expert changes nothing.

    Args:
      key: Random key.
      max_experts: Slots; later tasks can add no more experts than that, and each slot costs memory.
      rank: Rank of an expert.
      d_in: Features of the input.
      d_out: Features of the output.

    Returns:
      The pool, float32, without leading axes; ``jax.vmap`` over keys gives one for each layer.

    Raises:
      ValueError: A size is below 1, or ``rank`` is above ``d_in`` or ``d_out``.
    """
    for name, size in (("max_experts", max_experts), ("rank", rank), ("d_in", d_in), ("d_out", d_out)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if rank > min(d_in, d_out):
        raise ValueError(f"rank: expected at most {min(d_in, d_out)} for a kernel of {d_in} x {d_out}, got {rank}")
    none = jnp.zeros(max_experts, bool)
    a = _draw(key, (max_experts, d_in, rank))
    return ExpertPool(a, jnp.zeros((max_experts, rank, d_out)), none, none, jnp.full(max_experts, -1, jnp.int32))


def expand_pool(key: jax.Array, pool: ExpertPool, num: int, task: int | jax.Array) -> ExpertPool:
    """Adds candidates to the first free slots of each layer.

    Args:
      key: Random key of their factors ``a``; factors ``b`` are zero.
      pool: The pool.
      num: Candidates to add to each layer.
      task: The task that adds them, its number from 0.

    Returns:
      The pool.

    Raises:
      ValueError: ``num`` is below 1, or a layer has fewer free slots.  Where the pool is traced this is not
        checked, and fewer candidates are added.
    """
    check_room(pool, num)
    free = ~pool.active
    new = free & (jnp.cumsum(free, axis=-1) <= num)
    wide = new[..., None, None]
    return ExpertPool(
        jnp.where(wide, _draw(key, pool.a.shape).astype(pool.a.dtype), pool.a),
        jnp.where(wide, jnp.zeros_like(pool.b), pool.b),
        pool.active | new,
        pool.frozen,
        jnp.where(new, jnp.asarray(task, jnp.int32), pool.owner),
    )


def check_room(pool: ExpertPool, num: int) -> None:
    """Raises where a layer has no room for so many candidates, see :func:`expand_pool`."""
    if num < 1:
        raise ValueError(f"num: expected at least 1 candidate, got {num}")
    if isinstance(pool.active, jax.core.Tracer):
        return
    active = np.asarray(pool.active)
    least, size = int(np.min(np.sum(~active, axis=-1))), active.shape[-1]
    if least < num:
        raise ValueError(
            f"pool: is full: a layer has {least} free slots of {size}, and {num} candidates need room; make it larger "
            "(max_experts), or prune more (a larger tau)"
        )


def prune_pool(pool: ExpertPool, mean_probs: jax.Array, tau: float, *, relative: bool = True) -> Pruned:
    """Removes the candidates that a task's router hardly uses.

    An expert is kept where its mean probability is at least ``tau / E`` for ``E`` active experts of its layer, so that
    ``tau = 1`` is the mean of all.  Historical experts always stay in the pool; for them the rule only decides whether
    the task uses them.  Where no expert reaches the threshold, the most used one is kept.

    Args:
      pool: The pool.
      mean_probs: ``[..., experts]``, the mean routing probabilities over the training set of the task.
      tau: The threshold.
      relative: Whether it is divided by the active experts; otherwise ``tau`` is the least probability itself.

    Returns:
      The pool, and the mask of the task's router.

    Raises:
      ValueError: ``tau`` is not above 0, or the probabilities have another shape or are NaN.
    """
    if not tau > 0 or not np.isfinite(tau):
        raise ValueError(f"tau: expected a finite number above 0, got {tau}")
    if mean_probs.shape != pool.active.shape:
        raise ValueError(f"mean_probs: expected {pool.active.shape} as the pool's experts, got {mean_probs.shape}")
    linalg.check_finite("mean_probs", mean_probs)
    count = jnp.maximum(jnp.sum(pool.active, axis=-1, keepdims=True), 1).astype(mean_probs.dtype)
    least = jnp.asarray(tau, mean_probs.dtype) / (count if relative else jnp.ones_like(count))
    keep = pool.active & (mean_probs >= least)
    of_active = jnp.where(pool.active, mean_probs, -1)
    most = jax.nn.one_hot(jnp.argmax(of_active, axis=-1), keep.shape[-1], dtype=bool) & pool.active
    keep = jnp.where(jnp.any(keep, axis=-1, keepdims=True), keep, most)
    return Pruned(_without(pool, candidate_mask(pool) & ~keep), keep)


def freeze_pool(pool: ExpertPool) -> ExpertPool:
    """Makes all active experts historical ones, at the end of a task."""
    return pool._replace(frozen=pool.active)


def candidate_mask(pool: ExpertPool) -> jax.Array:
    """Returns which slots hold a candidate of the current task, ``[..., experts]`` bool."""
    return pool.active & ~pool.frozen


def parameter_counts(pool: ExpertPool, num_tasks: int = 0) -> ParameterCounts:
    """Counts the parameters of experts, for which routers do not count.

    Args:
      pool: The pool.
      num_tasks: Tasks to count by; none by default.

    Returns:
      The counts of each layer.
    """
    each = pool.a.shape[-2] * pool.a.shape[-1] + pool.b.shape[-2] * pool.b.shape[-1]
    owner = pool.owner
    tasks = jax.lax.broadcasted_iota(jnp.int32, (*owner.shape, num_tasks), owner.ndim)
    owned = pool.active[..., None] & (owner[..., None] == tasks)

    def count(mask: jax.Array, axis: int = -1) -> jax.Array:
        return each * jnp.sum(mask, axis=axis, dtype=jnp.int32)

    return ParameterCounts(count(pool.active), count(pool.frozen), count(candidate_mask(pool)), count(owned, -2))


def _without(pool: ExpertPool, gone: jax.Array) -> ExpertPool:
    wide = gone[..., None, None]
    return ExpertPool(
        jnp.where(wide, jnp.zeros_like(pool.a), pool.a),
        jnp.where(wide, jnp.zeros_like(pool.b), pool.b),
        pool.active & ~gone,
        pool.frozen & ~gone,
        jnp.where(gone, -1, pool.owner),
    )


def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = (6 / shape[-2]) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
