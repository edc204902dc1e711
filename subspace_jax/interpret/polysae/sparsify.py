"""What keeps a code sparse: TopK, BatchTopK and JumpReLU (arXiv 2602.01322), and the code of dead features."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.interpret.polysae.shards import Shards, before, first_feature, gathered_last, total

THRESHOLD_RATE = 0.01
_WHOLE = Shards()


class SparseCode(NamedTuple):
    """A code of few features.

    Attributes:
      values: ``[B, k]``, not negative; 0 for positions that hold no feature.
      indices: Their features, ``[B, k]`` int32.
    """

    values: jax.Array
    indices: jax.Array

    def dense(self, d_sae: int) -> jax.Array:
        """Returns the code as ``[B, d_sae]``."""
        examples = jnp.arange(len(self.values))[:, None]
        return jnp.zeros((len(self.values), d_sae), self.values.dtype).at[examples, self.indices].add(self.values)


def topk_code(pre: jax.Array, k: int, shards: Shards = _WHOLE) -> SparseCode:
    """Keeps the k largest entries of each row, and of these the positive ones.

    Of equal entries the first are kept.  Features that are sharded are searched where they are: k of each shard meet.

    Args:
      pre: Pre-activations, ``[B, m]``; inside ``shard_map`` those of this device.
      k: Entries to keep.
      shards: Mesh axes, inside ``shard_map``.
    """
    _check_k(pre, k, shards)
    values, indices = jax.lax.top_k(pre, min(k, pre.shape[1]))
    if shards.features:
        indices = indices + first_feature(pre.shape[1], shards.features)
        values, indices = (gathered_last(x, shards.features) for x in (values, indices))
        values, at = jax.lax.top_k(values, k)
        indices = jnp.take_along_axis(indices, at, axis=1)
    return SparseCode(jax.nn.relu(values), indices.astype(jnp.int32))


def topk(pre: jax.Array, k: int) -> jax.Array:
    """Returns the code of :func:`topk_code` as ``[B, m]``.

    Raises:
      ValueError: ``k`` is below 1 or above m.
    """
    return topk_code(pre, k).dense(pre.shape[1])


def batch_topk(pre: jax.Array, k: float, *, weights: jax.Array | None = None, shards: Shards = _WHOLE) -> jax.Array:
    """Keeps the ``floor(k B)`` largest positive entries of a whole batch.

    The smallest kept entry is found by bisection on the bits of floating-point numbers, which order as the numbers do:
    32 counts of the batch instead of a sort, each one sum over all devices.  Of equal entries the first are kept, row
    by row, so that the result is that of a stable sort.

    Args:
      pre: Pre-activations, ``[B, m]``; inside ``shard_map`` those of this device.
      k: Entries to keep, on average for each example.
      weights: ``[B]``, 0 for examples that do not count; all count by default.
      shards: Mesh axes, inside ``shard_map``.

    Returns:
      The code, ``[B, m]``.

    Raises:
      ValueError: ``k`` is not above 0, or above m.
    """
    _check_k(pre, k, shards)
    positive = jax.nn.relu(pre)
    if weights is None:
        examples = total(jnp.asarray(len(pre), pre.dtype), shards.batch)
    else:
        examples = total(jnp.sum(weights), shards.batch)
        positive = jnp.where(weights[:, None] > 0, positive, 0)
    wanted = jnp.floor(jnp.asarray(k, pre.dtype) * examples).astype(jnp.int32)
    return jnp.where(_largest(jax.lax.stop_gradient(positive), wanted, shards), positive, 0)


def _largest(x: jax.Array, wanted: jax.Array, shards: Shards) -> jax.Array:
    """Whether an entry of ``x [B, m]``, not negative, is among the largest of all."""
    integer = {4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, integer)

    def count(mask):
        return total(jnp.sum(mask, dtype=jnp.int32), shards.all)

    def halve(i, least):
        # The largest number whose count is still enough, bit by bit from above the sign.
        tried = least | (jnp.asarray(1, integer) << (8 * x.dtype.itemsize - 2 - i).astype(integer))
        return jnp.where(count(bits >= tried) >= wanted, tried, least)

    least = jax.lax.fori_loop(0, 8 * x.dtype.itemsize - 1, halve, jnp.asarray(0, integer))
    above, equal = bits > least, bits == least
    # The place of an equal entry among all equal ones, row by row.
    of_row = jnp.sum(equal, axis=1, dtype=jnp.int32)
    whole_rows = total(of_row, shards.features)
    rows_before = jnp.cumsum(whole_rows) - whole_rows + before(jnp.sum(whole_rows, dtype=jnp.int32), shards.batch)
    place = jnp.cumsum(equal, axis=1, dtype=jnp.int32) + (rows_before + before(of_row, shards.features))[:, None]
    return above | (equal & (place <= wanted - count(above)))


def next_threshold(threshold: jax.Array, code: jax.Array, shards: Shards = _WHOLE) -> jax.Array:
    """Moves the threshold of BatchTopK towards the smallest entry that a batch keeps, by a share of 0.01.

    Args:
      threshold: The threshold until now, a scalar.
      code: Code of the batch, ``[B, m]``; with no positive entry the threshold stays.
      shards: Mesh axes, inside ``shard_map``.
    """
    code = jax.lax.stop_gradient(code)
    least = jnp.min(jnp.where(code > 0, code, jnp.inf))
    if shards.all:
        least = jax.lax.pmin(least, shards.all)
    least = least.astype(threshold.dtype)
    return jnp.where(jnp.isfinite(least), (1 - THRESHOLD_RATE) * threshold + THRESHOLD_RATE * least, threshold)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumprelu(x: jax.Array, theta: jax.Array, eps: float) -> jax.Array:
    """Returns ``x`` where it is above its threshold, and 0 elsewhere.

    The gradient of a threshold is estimated by a rectangular kernel: the sum over the batch of ``-(theta / eps)
    [|x - theta| < eps / 2] g``.

    Args:
      x: ``[B, m]``.
      theta: Thresholds, ``[m]``.
      eps: Width of the kernel.
    """
    return x * _above(x, theta)


def _jumprelu_forward(x, theta, eps):
    return jumprelu(x, theta, eps), (x, theta)


def _jumprelu_backward(eps, kept, g):
    x, theta = kept
    return _above(x, theta) * g, -jnp.sum(theta[None] / eps * _near(x, theta, eps) * g, axis=0)


jumprelu.defvjp(_jumprelu_forward, _jumprelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step_fn(x: jax.Array, theta: jax.Array, eps: float) -> jax.Array:
    """Returns 1 where ``x`` is above its threshold, and 0 elsewhere.

    Of the thresholds alone it has a gradient: the sum over the batch of ``-1 / eps [|x - theta| < eps / 2] g``.
    Arguments: see :func:`jumprelu`.
    """
    return _above(x, theta)


def _step_forward(x, theta, eps):
    return step_fn(x, theta, eps), (x, theta)


def _step_backward(eps, kept, g):
    x, theta = kept
    return jnp.zeros_like(x), -jnp.sum(_near(x, theta, eps) * g, axis=0) / eps


step_fn.defvjp(_step_forward, _step_backward)


def auxk_code(pre: jax.Array, dead: jax.Array, k_aux: int, shards: Shards = _WHOLE) -> jax.Array:
    """Returns the ``k_aux`` largest pre-activations among dead features, or those of all of them where they are fewer.

    They may be negative: there is no ReLU.

    Args:
      pre: Pre-activations, ``[B, m]``; inside ``shard_map`` those of this device.
      dead: Whether a feature is dead, ``[m]``.
      k_aux: Entries to keep.
      shards: Mesh axes, inside ``shard_map``.

    Returns:
      ``[B, m]``, 0 for all others.
    """
    only = jnp.where(dead[None], pre, -jnp.inf)
    values = jax.lax.top_k(jax.lax.stop_gradient(only), min(k_aux, pre.shape[1]))[0]
    if shards.features:
        values = jax.lax.top_k(gathered_last(values, shards.features), k_aux)[0]
    least, above = values[:, -1:], only > values[:, -1:]
    # Of equal entries the first are kept; with few dead features the smallest kept entry is no number.
    equal = (only == least) & jnp.isfinite(least)
    counts = jnp.sum(above, axis=1, dtype=jnp.int32), jnp.sum(equal, axis=1, dtype=jnp.int32)
    place = jnp.cumsum(equal, axis=1, dtype=jnp.int32) + before(counts[1], shards.features)[:, None]
    kept = above | (equal & (place <= (k_aux - total(counts[0], shards.features))[:, None]))
    return jnp.where(kept, pre, 0)


def _above(x, theta):
    return (x > theta[None]).astype(x.dtype)


def _near(x, theta, eps):
    return (jnp.abs(x - theta[None]) < eps / 2).astype(x.dtype)


def _check_k(pre: jax.Array, k: float, shards: Shards) -> None:
    features = pre.shape[1] * (jax.lax.axis_size(shards.features) if shards.features else 1)
    if not 0 < k <= features:
        raise ValueError(f"k: expected a number above 0 and at most the {features} features, got {k}")
