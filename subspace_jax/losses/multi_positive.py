"""Contrastive losses of labelled examples: an anchor has several positives among the keys.

They differ in what an anchor's positives are compared with and where they are averaged:

  supervised_infonce      log of the sum over positives against all others: one close positive is enough
  supervised_contrastive  mean over positives of the log, each against all keys: every positive is to be close
  multi_positive_infonce  mean over positives of the log, each against the negatives alone

All are functions of the global batch: where it is sharded, keys of all devices are compared with each anchor.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.linalg import times, unit_vectors, working_dtype

_MASKED = -1e30  # a score that adds nothing to a logarithm of a sum, and is finite so that gradients are


def supervised_infonce(
    z: jax.Array, labels: jax.Array, temperature: float, *, clip: float = 100.0, block_size: int = 1024
) -> jax.Array:
    """Logarithm of the share that examples of the same label have in the similarities of an example to all others.

    The loss of the factor subspaces of XFactors (arXiv 2601.21688): with cosines ``s = z_i.z_j / temperature``, clipped
    to ``[-clip, clip]``, the mean of ``logsumexp_{j != i} s_ij - logsumexp_{j in P(i)} s_ij`` over the examples that
    have a positive.  Holds ``[batch, block_size]`` cosines at a time, in the backward pass too.

    Args:
      z: ``[batch, n]``, floating point, normalized here; zeros stay zeros.
      labels: ``[batch]`` integers.
      temperature: Divides the cosines.
      clip: Largest magnitude of a scaled cosine.
      block_size: Keys compared at a time.

    Returns:
      A scalar in nats, float32 or wider; 0 where no label occurs twice.

    Raises:
      ValueError: Shapes do not match, or ``temperature`` is not positive.
    """
    _check("z", z, "labels", labels, temperature)
    z = unit_vectors(z.astype(working_dtype(z)))
    index = jnp.arange(z.shape[0], dtype=jnp.int32)

    def add(carry, keys, is_key):
        others, positives, count = carry
        z_keys, of_keys, at = keys
        # In full precision: a temperature of 0.03 makes errors of cosines 33 times as large.
        scores = jnp.clip(times(z, z_keys.T) / temperature, -clip, clip)
        other = is_key[None] & (index[:, None] != at[None])
        positive = other & (labels[:, None] == of_keys[None])
        count = count + jnp.sum(positive, axis=1, dtype=jnp.int32)
        return _add_logsumexp(others, scores, other), _add_logsumexp(positives, scores, positive), count

    nothing = jnp.full_like(z[:, 0], _MASKED)
    others, positives, count = scan_keys(add, (nothing, nothing, jnp.zeros_like(index)), (z, labels, index), block_size)
    return _mean_of(others - positives, count > 0)


def supervised_contrastive(
    anchors: jax.Array,
    keys: jax.Array,
    labels: jax.Array,
    key_labels: jax.Array,
    temperature: float,
    *,
    block_size: int = 1024,
) -> jax.Array:
    """Cross-entropy of the keys with an anchor's label among all keys (SupCon, arXiv 2004.11362, equation 2).

    With cosines ``s = a_i.k_j / temperature``, the mean of ``logsumexp_j s_ij - mean_{j in P(i)} s_ij`` over the
    anchors that have a positive.  Holds ``[anchors, block_size]`` cosines at a time, in the backward pass too.

    Args:
      anchors: ``[anchors, n]``, floating point, normalized here; zeros stay zeros.
      keys: ``[keys, n]``, likewise.
      labels: ``[anchors]`` integers.
      key_labels: ``[keys]`` integers.
      temperature: Divides the cosines.
      block_size: Keys compared at a time.

    Returns:
      A scalar in nats, float32 or wider; 0 where no anchor has a key of its label.

    Raises:
      ValueError: Shapes do not match, or ``temperature`` is not positive.
    """
    _check("anchors", anchors, "labels", labels, temperature)
    _check("keys", keys, "key_labels", key_labels, temperature)
    if anchors.shape[1] != keys.shape[1]:
        raise ValueError(f"anchors, keys: expected vectors of one width, got {anchors.shape[1]} and {keys.shape[1]}")
    dtype = working_dtype(anchors, keys)
    anchors, keys = (unit_vectors(x.astype(dtype)) for x in (anchors, keys))

    def add(carry, block, is_key):
        every, positives, count = carry
        vectors, of_keys = block
        scores = times(anchors, vectors.T) / temperature
        positive = is_key[None] & (labels[:, None] == of_keys[None])
        positives = positives + jnp.sum(jnp.where(positive, scores, 0.0), axis=1)
        return _add_logsumexp(every, scores, is_key[None]), positives, count + jnp.sum(positive, 1, dtype=jnp.int32)

    start = (jnp.full_like(anchors[:, 0], _MASKED), jnp.zeros_like(anchors[:, 0]), jnp.zeros_like(labels, jnp.int32))
    every, positives, count = scan_keys(add, start, (keys, key_labels), block_size)
    return _mean_of(every - positives / jnp.maximum(count, 1).astype(dtype), count > 0)


def multi_positive_infonce(
    logits: jax.Array, positives: jax.Array, negatives: jax.Array, *, reduction: str = "anchor"
) -> jax.Array:
    """Cross-entropy of each positive among itself and the negatives (Hydra, arXiv 2410.18200).

    ``l_ij = log(exp(s_ij) + sum over the negatives m of exp(s_im)) - s_ij`` for each positive ``j`` of an anchor ``i``;
    other positives do not appear in it.

    Args:
      logits: ``[anchors, keys]``, floating point.
      positives: ``[anchors, keys]`` bool.
      negatives: ``[anchors, keys]`` bool; keys in neither are ignored.
      reduction: "anchor": the mean over all anchors of the mean over their positives, 0 for an anchor without any;
        "global": the mean over all pairs of an anchor and a positive.

    Returns:
      A scalar in nats, float32 or wider; 0 without positives.

    Raises:
      ValueError: Shapes do not match, or ``reduction`` is unknown.
    """
    if logits.ndim != 2 or not logits.shape == positives.shape == negatives.shape:
        raise ValueError(
            "logits, positives, negatives: expected [anchors, keys] alike, "
            f"got {logits.shape}, {positives.shape} and {negatives.shape}"
        )
    if reduction not in ("anchor", "global"):
        raise ValueError(f"reduction: expected 'anchor' or 'global', got {reduction!r}")
    logits = logits.astype(working_dtype(logits))
    against = _add_logsumexp(jnp.full_like(logits[:, 0], _MASKED), logits, negatives)
    each = jnp.where(positives, jax.nn.softplus(against[:, None] - logits), 0.0)
    count = jnp.sum(positives, axis=1).astype(logits.dtype)
    if reduction == "global":
        return jnp.sum(each) / jnp.maximum(jnp.sum(count), 1.0)
    return jnp.mean(jnp.sum(each, axis=1) / jnp.maximum(count, 1.0))


def scan_keys(body: Callable[[Any, Any, jax.Array], Any], carry: Any, keys: Any, block_size: int) -> Any:
    """Folds a function over blocks of keys, each recomputed in the backward pass.

    Args:
      body: ``body(carry, block, is_key) -> carry`` with ``block`` like ``keys`` of ``block_size`` keys, of which
        ``is_key [block_size]`` bool tells padding from keys.
      carry: Pytree of arrays.
      keys: Pytree of arrays with a leading axis of keys.
      block_size: Keys of a block; a single block where there are no more.

    Returns:
      The last carry.

    Raises:
      ValueError: ``block_size`` is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    num_keys = jax.tree.leaves(keys)[0].shape[0]
    num_blocks = -(-num_keys // block_size)
    if num_blocks <= 1:
        return body(carry, keys, jnp.ones(num_keys, bool))

    def blocks(x):
        padding = [(0, num_blocks * block_size - num_keys)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(num_blocks, block_size, *x.shape[1:])

    xs = jax.tree.map(blocks, (keys, jnp.ones(num_keys, bool)))
    step = jax.checkpoint(lambda carry, x: (body(carry, *x), None), prevent_cse=False)
    return jax.lax.scan(step, carry, xs)[0]


def _add_logsumexp(total: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Adds the exponentials of masked scores to those summed in ``total [anchors]``."""
    return jnp.logaddexp(total, jax.nn.logsumexp(jnp.where(mask, scores, _MASKED), axis=1))


def _mean_of(loss: jax.Array, kept: jax.Array) -> jax.Array:
    kept_loss = jnp.where(kept, loss, 0.0)
    return jnp.sum(kept_loss) / jnp.maximum(jnp.sum(kept).astype(loss.dtype), 1.0)


def _check(name: str, x: jax.Array, labels_name: str, labels: jax.Array, temperature: float) -> None:
    if x.ndim != 2 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name}, {labels_name}: expected [examples, n] and [examples], got {x.shape} and {labels.shape}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
