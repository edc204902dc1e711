"""Prompt learning: context vectors before a frozen text encoder (CoOp), and its limit in the space of features.

Zhou et al., "Learning to Prompt for Vision-Language Models" (arXiv 2109.01134).  Residuals of prototypes: Yu et al.,
"Task Residual for Tuning Vision-Language Models" (arXiv 2211.10277).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax import losses
from subspace_jax.linalg import times, unit_vectors, working_dtype
from subspace_jax.represent.few_shot_survey.clip_adapter import Shots
from subspace_jax.represent.few_shot_survey.fitting import fit_steps, sgd_of_coop
from subspace_jax.represent.few_shot_survey.prototypes import check_labels, check_widths, zero_shot_logits

POSITIONS = ("end", "middle", "front")


def assemble_prompts(
    context: jax.Array, embeddings: jax.Array, name_lengths: np.ndarray, position: str = "end"
) -> jax.Array:
    """Puts context vectors into the token embeddings of each class's prompt.

    ::

        end     start, context, name, rest
        middle  start, first half of the context, name, second half, rest
        front   start, name, context, rest

    Args:
      context: ``[M, e]`` for all classes, or ``[classes, M, e]``.
      embeddings: Token embeddings ``[classes, L, e]`` of "start, M placeholders, name, rest".
      name_lengths: Tokens of each class's name, ``[classes]`` integers on the host.
      position: One of :data:`POSITIONS`.

    Returns:
      ``[classes, L, e]``.

    Raises:
      ValueError: Shapes don't match, a name does not fit behind ``M`` vectors, or the position is unknown.
    """
    if position not in POSITIONS:
        raise ValueError(f"position: expected one of {POSITIONS}, got {position!r}")
    shape, own = embeddings.shape, context.shape
    if len(shape) != 3 or len(own) not in (2, 3) or own[-1] != shape[2] or own[:-2] not in ((), shape[:1]):
        raise ValueError(
            "context, embeddings: expected [M, e] or [classes, M, e], and [classes, L, e]; "
            f"got {context.shape} and {embeddings.shape}"
        )
    lengths, count = np.asarray(name_lengths), own[-2]
    if lengths.shape != shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"name_lengths: expected {shape[0]} integers, got {lengths.dtype} {list(lengths.shape)}")
    if lengths.min() < 0 or 1 + count + lengths.max() > shape[1]:
        raise ValueError(
            f"name_lengths: expected 0 to {shape[1] - 1 - count}, beside the first token and {count} vectors in "
            f"{shape[1]} positions; got {lengths.min()} to {lengths.max()}"
        )
    context = jnp.broadcast_to(context, (*shape[:1], *own[-2:]))
    suffix = embeddings[:, 1 + count :]
    # Positions in [context, suffix] of what stands behind the first token.
    before = {"end": count, "middle": count // 2, "front": 0}[position]
    at, name = np.arange(shape[1] - 1)[None], lengths[:, None]
    inside = (at >= before) & (at < before + name)
    behind = (at >= before + name) & (at < count + name)
    source = np.where(inside, count + at - before, np.where(behind, at - name, at))
    rest = jnp.take_along_axis(jnp.concatenate([context, suffix], axis=1), source[:, :, None], axis=1)
    return jnp.concatenate([embeddings[:, :1], rest], axis=1)


class CoOpPrompts(nnx.Module):
    """Prompts whose context vectors are trained, before a frozen text encoder.

    Args:
      embeddings: See :func:`assemble_prompts`.
      name_lengths: See :func:`assemble_prompts`.
      num_context: Number of context vectors, ``M``; 16 or 4 in the paper.
      per_class: Whether each class has context vectors of its own.
      position: See :func:`assemble_prompts`.
      param_dtype: Dtype of the context vectors, drawn from a normal distribution of deviation 0.02.
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: See :func:`assemble_prompts`.
    """

    def __init__(
        self,
        embeddings: jax.Array,
        name_lengths: np.ndarray,
        *,
        num_context: int = 16,
        per_class: bool = False,
        position: str = "end",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        lead = embeddings.shape[:1] if per_class else ()
        draw = jax.random.normal(rngs.params(), (*lead, num_context, embeddings.shape[-1]), param_dtype)
        self.context = nnx.Param(0.02 * draw, axes=("class", None, "embed")[3 - draw.ndim :])
        self.name_lengths = tuple(int(n) for n in np.asarray(name_lengths))
        self.position = position
        assemble_prompts(self.context.get_value(), embeddings, np.array(self.name_lengths), position)

    def __call__(self, embeddings: jax.Array) -> jax.Array:
        """Puts the context into embeddings ``[classes, L, e]``; see :func:`assemble_prompts`."""
        lengths = np.array(self.name_lengths, np.int32)
        return assemble_prompts(self.context.get_value(), embeddings, lengths, self.position)


def fit_prompts(
    prompts: CoOpPrompts,
    encode_text: Callable[[jax.Array], jax.Array],
    embeddings: jax.Array,
    shots: Shots,
    order: jax.Array,
    *,
    scale: float = 100.0,
    tx: optax.GradientTransformation | None = None,
) -> tuple[CoOpPrompts, jax.Array]:
    """Trains context vectors through a frozen text encoder.

    Args:
      prompts: The prompts to start from; they are left as they are.
      encode_text: Maps prompts ``[classes, L, e]`` to vectors ``[classes, n]``; a ``jax.tree_util.Partial`` with the
        encoder's parameters keeps them out of the compiled program.
      embeddings: Token embeddings of the prompts, ``[classes, L, e]``.
      shots: Labelled features.
      order: Indices of the examples of each step, ``[steps, batch]``; see :func:`batch_order`.
      scale: See :func:`zero_shot_logits`.
      tx: Optimizer; by default SGD as for :func:`fit_clip_adapter`.

    Returns:
      The trained prompts, and the mean cross-entropy before each step, ``[steps]``.

    Raises:
      ValueError: Shapes don't match, or a label is out of range.
    """
    check_labels(shots.features, shots.labels, embeddings.shape[0])
    tx = sgd_of_coop(2e-3, len(order)) if tx is None else tx
    if not isinstance(encode_text, jax.tree_util.Partial):
        encode_text = jax.tree_util.Partial(encode_text)
    return fit_steps(_prompt_loss, tx, prompts, order, tuple(shots), (encode_text, embeddings, scale))


class LowRank(NamedTuple):
    """A residual ``u v^T`` of the prototypes.

    Attributes:
      u: ``[classes, rank]``.
      v: ``[n, rank]``.
    """

    u: jax.Array
    v: jax.Array


Residual = jax.Array | LowRank


def prompt_residual(text: jax.Array, delta: Residual) -> jax.Array:
    """Moves prototypes, ``normalize(text + delta)``: what prompts can do at most, without a text encoder.

    Args:
      text: Prototypes ``[classes, n]``.
      delta: ``[classes, n]``, ``[n]`` for all classes, or a :class:`LowRank`.

    Returns:
      Unit vectors ``[classes, n]``, float32 or wider.

    Raises:
      ValueError: Shapes don't match.
    """
    dtype = working_dtype(text)
    full = times(delta.u.astype(dtype), delta.v.astype(dtype).T) if isinstance(delta, LowRank) else delta
    if text.ndim != 2 or full.shape not in (text.shape, text.shape[1:]):
        raise ValueError(f"delta: expected [classes, n] or [n] for text {text.shape}, got {full.shape}")
    return unit_vectors(text.astype(dtype) + jnp.broadcast_to(full.astype(dtype), text.shape))


def start_residual(text: jax.Array, key: jax.Array, rank: int | None = None) -> Residual:
    """Returns a residual of zero, of full rank or of a lower one.

    Args:
      text: Prototypes ``[classes, n]``.
      key: Random key, of the right factor of a low rank; it has orthogonal columns of about unit length.
      rank: Rank, at most that of ``text``; None for a full matrix.

    Raises:
      ValueError: The rank is out of range.
    """
    if rank is None:
        return jnp.zeros_like(text, working_dtype(text))
    if not 1 <= rank <= min(text.shape):
        raise ValueError(f"rank: expected 1 to {min(text.shape)}, got {rank}")
    v = jax.random.normal(key, (text.shape[1], rank), working_dtype(text)) * text.shape[1] ** -0.5
    return LowRank(jnp.zeros((text.shape[0], rank), v.dtype), v)


def fit_residual(
    delta: Residual,
    shots: Shots,
    text: jax.Array,
    order: jax.Array,
    *,
    scale: float = 100.0,
    tx: optax.GradientTransformation | None = None,
) -> tuple[Residual, jax.Array]:
    """Trains a residual of the prototypes by the cross-entropy of labelled features.

    Args:
      delta: Where it starts, see :func:`start_residual`; ``zeros [n]`` for a residual that all classes share.
      shots: Labelled features.
      text: Prototypes ``[classes, n]``.
      order: Indices of the examples of each step, ``[steps, batch]``; see :func:`batch_order`.
      scale: See :func:`zero_shot_logits`.
      tx: Optimizer; by default SGD as for :func:`fit_clip_adapter`.

    Returns:
      The trained residual, and the mean loss before each step, ``[steps]``.

    Raises:
      ValueError: Shapes don't match, or a label is out of range.
    """
    check_widths(shots.features, text)
    check_labels(shots.features, shots.labels, text.shape[0])
    prompt_residual(text, delta)
    tx = sgd_of_coop(2e-3, len(order)) if tx is None else tx
    return fit_steps(_residual_loss, tx, delta, order, tuple(shots), (text, scale))


def _prompt_loss(prompts, batch, encode_text, embeddings, scale):
    features, labels = batch
    text = encode_text(prompts(embeddings))
    return jnp.mean(losses.cross_entropy(zero_shot_logits(features, text, scale), labels))


def _residual_loss(delta, batch, text, scale):
    features, labels = batch
    return jnp.mean(losses.cross_entropy(zero_shot_logits(features, prompt_residual(text, delta), scale), labels))
