"""The arrays of dynamic subspace learners: normalization by learner, scores of neurons, splits, clusters of examples.

Source: arXiv 2206.09068 and its authors' code.  A learner is a set of neurons of the embedding.  Which one a neuron
belongs to is an array, so that the number of learners changes without recompiling.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax import linalg, metrics

PyTree = Any

RESTARTS, MAX_STEPS = 5, 100  # of k-means


class ScoreState(NamedTuple):
    """Sums over the batches of an epoch.

    Attributes:
      sum_ag: Activation times gradient, summed over examples, float32 ``[neurons]``.
      count: Number of examples, int32 ``[]``.
    """

    sum_ag: jax.Array
    count: jax.Array


class PlateauState(NamedTuple):
    """The best validation score until now.

    Attributes:
      best: The score, float32 ``[]``; -1 before the first.
      best_epoch: Its epoch, int32 ``[]``.
      explore: Whether a learner may be split: false from a split until the next best score, bool ``[]``.
    """

    best: jax.Array
    best_epoch: jax.Array
    explore: jax.Array


class Split(NamedTuple):
    """The result of :func:`split_learner`: ``params``, ``learner_id``, and the bool ``did_split``."""

    params: PyTree
    learner_id: jax.Array
    did_split: jax.Array


def contiguous_learners(num_neurons: int, num_learners: int) -> jax.Array:
    """Returns the learner of each neuron, int32 ``[num_neurons]``: slices of one size, up to one neuron."""
    return jnp.arange(num_neurons, dtype=jnp.int32) * num_learners // num_neurons


def normalize_per_learner(e: jax.Array, learner_id: jax.Array, max_learners: int) -> jax.Array:
    """Scales the part of each learner to unit length.

    Args:
      e: Embeddings ``[batch, neurons]``, floating point.
      learner_id: Learner of each neuron, ``[neurons]`` integers in ``[0, max_learners)``.
      max_learners: The most learners that there may be; static.

    Returns:
      ``[batch, neurons]``, float32 or wider, of length ``sqrt(learners)``; a part that is zero stays zero.

    Raises:
      ValueError: Shapes do not match, or there may be no learner.
    """
    if e.ndim != 2 or learner_id.shape != e.shape[1:]:
        raise ValueError(f"e, learner_id: expected [batch, neurons] and [neurons], got {e.shape}, {learner_id.shape}")
    if max_learners < 1:
        raise ValueError(f"max_learners: expected at least 1, got {max_learners}")
    e = e.astype(linalg.working_dtype(e))
    members = jax.nn.one_hot(learner_id, max_learners, dtype=e.dtype)
    full = jax.lax.Precision.HIGHEST
    squares = jnp.matmul(jnp.matmul(jnp.square(e), members, precision=full), members.T, precision=full)
    positive = squares > 0
    return jnp.where(positive, e * jax.lax.rsqrt(jnp.where(positive, squares, 1)), 0)


def init_scores(num_neurons: int) -> ScoreState:
    """Returns sums of no example."""
    return ScoreState(jnp.zeros(num_neurons, jnp.float32), jnp.zeros((), jnp.int32))


def score_update(state: ScoreState, a: jax.Array, g: jax.Array) -> ScoreState:
    """Adds the examples of a batch.

    Args:
      state: The sums.
      a: Activations ``[batch, neurons]``, normalized by learner.
      g: Gradient of the loss of the batch by them, of the same shape.
    """
    return ScoreState(
        state.sum_ag + jnp.sum(a * g, axis=0).astype(state.sum_ag.dtype), state.count + jnp.int32(a.shape[0])
    )


def neuron_scores(state: ScoreState, mask: jax.Array) -> jax.Array:
    """First-order estimate of how much each neuron of one learner matters to the loss.

    The mean of activation times gradient in magnitude, scaled so that the least is 0 and the largest 1.

    Args:
      state: The sums of an epoch.
      mask: Which neurons belong to the learner, bool ``[neurons]``.

    Returns:
      ``[neurons]``; 0 outside the learner, and everywhere if all scores are equal.
    """
    count = jnp.maximum(state.count, 1).astype(state.sum_ag.dtype)
    size = jnp.where(mask, jnp.abs(state.sum_ag / count), 0)
    size = size / jnp.sqrt(jnp.sum(jnp.square(size)) + 1e-8)
    low, high = jnp.min(size, where=mask, initial=jnp.inf), jnp.max(size, where=mask, initial=0)
    spread = high - low
    return jnp.where(mask & (spread > 0), (size - low) / jnp.where(spread > 0, spread, 1), 0)


def fresh_learners(key: jax.Array, fan_in: int, learner_id: jax.Array, max_learners: int) -> PyTree:
    """Draws the weights of an embedding layer, each learner as a layer of its own.

    Kernels are normal with variance ``2 / (fan_in + neurons of the learner)`` (Xavier), biases uniform within
    ``1 / sqrt(fan_in)``.

    Args:
      key: Random key.
      fan_in: Width of the input.
      learner_id: Learner of each neuron, ``[neurons]``.
      max_learners: The most learners that there may be.

    Returns:
      ``{kernel [fan_in, neurons], bias [neurons]}``, float32.
    """
    of_kernel, of_bias = jax.random.split(key)
    sizes = jax.ops.segment_sum(jnp.ones(learner_id.shape), learner_id, max_learners)[learner_id]
    bound = 1 / math.sqrt(fan_in)
    return {
        "kernel": jax.random.normal(of_kernel, (fan_in, *learner_id.shape)) * jnp.sqrt(2 / (fan_in + sizes))[None],
        "bias": jax.random.uniform(of_bias, learner_id.shape, minval=-bound, maxval=bound),
    }


def last_learner(learner_id: jax.Array) -> jax.Array:
    """Returns which neurons belong to the newest learner, bool ``[neurons]``."""
    return learner_id == jnp.max(learner_id)


def split_learner(
    key: jax.Array,
    params: PyTree,
    learner_id: jax.Array,
    scores: jax.Array,
    max_learners: int,
    *,
    min_kept: int = 5,
    min_neurons: int = 11,
) -> Split:
    """Makes two learners of the newest one: one of its useful neurons, one that starts afresh.

    Neurons with a score above 0.5 move to the first of the learner's positions, the best first, and stay that learner.
    The other positions are drawn anew, by :func:`fresh_learners`, and become the newest learner.

    Args:
      key: Random key of the new weights.
      params: ``{kernel [fan_in, neurons], bias [neurons]}`` of the embedding layer.
      learner_id: Learner of each neuron, int32 ``[neurons]``.
      scores: From :func:`neuron_scores`, ``[neurons]``.
      max_learners: The most learners that there may be.
      min_kept: Neurons that have to be above 0.5.
      min_neurons: Neurons that the newest learner has to have.

    Returns:
      Weights and learners after the split.  Where too few neurons are useful or there, or there are ``max_learners``
      already, both are the same bits as before.

    Raises:
      ValueError: Shapes do not match, or the layer has fewer than ``min_kept + 1`` neurons.
    """
    kernel, bias = params["kernel"], params["bias"]
    if not kernel.shape[1:] == bias.shape == learner_id.shape == scores.shape:
        raise ValueError(
            f"params, learner_id, scores: expected as many neurons in each, got {kernel.shape}, {bias.shape}, "
            f"{learner_id.shape} and {scores.shape}"
        )
    check_num_neurons("params", scores.shape[0], min_kept + 1)
    members = last_learner(learner_id)
    kept = members & (scores > 0.5)
    num_kept = jnp.sum(kept, dtype=jnp.int32)
    best_first = jnp.argsort(-jnp.where(kept, scores, -jnp.inf)).astype(jnp.int32)
    position = jnp.cumsum(members, dtype=jnp.int32) - 1  # among those of the learner
    finished, fresh = members & (position < num_kept), members & (position >= num_kept)
    source = jnp.where(finished, best_first[position], jnp.arange(len(scores), dtype=jnp.int32))
    new_id = learner_id + fresh.astype(learner_id.dtype)
    did_split = (
        (num_kept >= min_kept)
        & (jnp.sum(members, dtype=jnp.int32) >= min_neurons)
        & (jnp.max(learner_id) + 1 < max_learners)
    )
    drawn = fresh_learners(key, kernel.shape[0], new_id, max_learners)
    # All sources are read before any position is written.
    new = {
        "kernel": jnp.where(fresh[None], drawn["kernel"].astype(kernel.dtype), kernel[:, source]),
        "bias": jnp.where(fresh, drawn["bias"].astype(bias.dtype), bias[source]),
    }
    chosen = {name: jnp.where(did_split, new[name], params[name]) for name in new}
    return Split(chosen, jnp.where(did_split, new_id, learner_id), did_split)


def check_num_neurons(name: str, num_neurons: int, least: int = 6) -> None:
    """Raises a ValueError where an embedding has too few neurons to be split."""
    if num_neurons < least:
        raise ValueError(f"{name}: expected an embedding of at least {least} neurons, got {num_neurons}")


def reset_moments(opt_state: PyTree, layer: str, rewritten: jax.Array) -> PyTree:
    """Zeroes the moments of neurons that were rewritten.

    Args:
      opt_state: State of an optimizer that keeps its moments in trees like the parameters, as Adam does.
      layer: Path of the layer in the parameters.
      rewritten: Which neurons, bool ``[neurons]``.

    Returns:
      The state; arrays that lie at other paths, or have another last axis, are as they were.
    """
    ends = tuple(f"/{layer}/{name}" for name in ("kernel", "bias"))

    def one(path, x):
        where = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        if not where.endswith(ends) or x.shape[-1:] != rewritten.shape:
            return x
        return jnp.where(rewritten.reshape((1,) * (x.ndim - 1) + rewritten.shape), jnp.zeros((), x.dtype), x)

    return jax.tree_util.tree_map_with_path(one, opt_state)


def init_plateau() -> PlateauState:
    """Returns the state before the first epoch."""
    return PlateauState(jnp.full((), -1, jnp.float32), jnp.zeros((), jnp.int32), jnp.ones((), bool))


def plateau_update(state: PlateauState, nmi: ArrayLike, epoch: ArrayLike) -> PlateauState:
    """Notes the validation score of an epoch, and allows a split again where it is the best.

    Args:
      state: The state.
      nmi: Score after the epoch, at least 0.
      epoch: Number of the epoch, from 0.
    """
    nmi, epoch = jnp.asarray(nmi, jnp.float32), jnp.asarray(epoch, jnp.int32)
    better = nmi > state.best
    return PlateauState(
        jnp.where(better, nmi, state.best),
        jnp.where(better, epoch, state.best_epoch),
        state.explore | better,
    )


def plateau_reached(state: PlateauState, epoch: ArrayLike, patience: int) -> jax.Array:
    """Returns whether a learner is to be split after this epoch: ``patience`` epochs gave no better score, bool ``[]``.

    Args:
      state: The state after this epoch.
      epoch: Number of the epoch, from 0; none is split after the first.
      patience: Epochs since the best one.
    """
    epoch = jnp.asarray(epoch, jnp.int32)
    return state.explore & (epoch > 0) & (epoch >= state.best_epoch + patience)


def recluster(key: jax.Array, features: jax.Array, num_clusters: int, previous: jax.Array) -> jax.Array:
    """Clusters examples anew, by k-means on normalized features, with names that agree best with those before.

    Args:
      key: Random key of k-means.
      features: ``[examples, n]``, floating point.
      num_clusters: Number of clusters; static.
      previous: Clusters before, ``[examples]`` int32.

    Returns:
      Cluster of each example, ``[examples]`` int32.
    """
    unit = linalg.unit_vectors(features.astype(linalg.working_dtype(features)))
    found = linalg.kmeans(key, unit, num_clusters, restarts=RESTARTS, max_steps=MAX_STEPS).assignments
    return metrics.match_assignments(previous, found, num_clusters)
