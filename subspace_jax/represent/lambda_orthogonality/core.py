"""Maps between the vectors of two models, their loss, and the order in which a gallery is re-embedded."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import linalg, losses, nn

_AT_A_TIME = 4096


class Affine(NamedTuple):
    """An affine map of vectors, ``h kernel + bias``.

    Attributes:
      kernel: ``[n, m]``.
      bias: ``[m]``.
    """

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps ``[..., n]`` to ``[..., m]``."""
        return nn.linear(h, self.kernel, self.bias)


class CompatParams(NamedTuple):
    """The two maps between an old and a new model.

    Attributes:
      backward: From new vectors to the old space, near-orthogonal.
      forward: From old vectors to the new space.
    """

    backward: Affine
    forward: Affine


@dataclass(frozen=True)
class CompatSettings:
    """Settings of :func:`compat_loss`, all of them a design choice.

    Attributes:
      weights: Factors of the backward, forward, contrastive and orthogonality terms.
      lam: Threshold of :func:`subspace_jax.losses.lambda_orthogonality`.
      kappa: Its sharpness.
      temperature: Temperature of :func:`subspace_jax.losses.supervised_contrastive`.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 0.1, 100.0)
    lam: float = 1.0
    kappa: float = 20.0
    temperature: float = 0.1


def compat_loss(
    params: CompatParams,
    h_new: jax.Array,
    h_old: jax.Array,
    labels: jax.Array,
    settings: CompatSettings = CompatSettings(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of the maps between two models, for the vectors of the same examples.

    ``w_B mean ||B(new) - old||^2 + w_F mean ||F(old) - new||^2 + w_C L_C + w_R R(B)``, where ``L_C`` is the supervised
    contrastive loss of ``B(new)`` among all old vectors of the batch, and ``R`` the penalty on the kernel of ``B``.
    Which terms there are is the paper's (arXiv 2509.16664, as summaries of it say); their formulas are a design choice.

    Args:
      params: The maps.
      h_new: Vectors of the new model, ``[batch, n]``.
      h_old: Vectors of the old model, ``[batch, m]``.
      labels: Classes, ``[batch]`` integers.
      settings: Weights and constants; a term of weight 0 is not computed.

    Returns:
      The loss, and its terms ``backward``, ``forward``, ``contrastive`` and ``orthogonality``, scalars.

    Raises:
      ValueError: The maps don't fit the vectors, or these are not paired; or a setting is out of range.
    """
    check_pairs(h_old, h_new, labels)
    expected = {"backward": (h_new.shape[1], h_old.shape[1]), "forward": (h_old.shape[1], h_new.shape[1])}
    for name, shape in expected.items():
        got = getattr(params, name).kernel.shape
        if got != shape:
            raise ValueError(f"{name}: expected a kernel {list(shape)} for these vectors, got {list(got)}")
    back, forth, contrastive, orthogonal = settings.weights
    mapped = params.backward(h_new)
    zero = jnp.zeros((), linalg.working_dtype(mapped))
    terms = {
        "backward": _mean_square(mapped - h_old) if back else zero,
        "forward": _mean_square(params.forward(h_old) - h_new) if forth else zero,
        "contrastive": zero,
        "orthogonality": zero,
    }
    if contrastive:
        terms["contrastive"] = losses.supervised_contrastive(mapped, h_old, labels, labels, settings.temperature)
    if orthogonal:
        terms["orthogonality"] = losses.lambda_orthogonality(params.backward.kernel, settings.lam, settings.kappa)
    loss = sum(weight * term for weight, term in zip(settings.weights, terms.values(), strict=True))
    return loss, terms


def class_means(h: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns the mean vector of each class, ``[classes, n]``; NaN for a class without examples.

    Args:
      h: ``[examples, n]``.
      labels: ``[examples]`` integers from 0.
      num_classes: Number of classes.
    """
    counts = jax.ops.segment_sum(jnp.ones_like(h[:, 0]), labels, num_classes)
    return jax.ops.segment_sum(h, labels, num_classes) / counts[:, None]


def backfill_scores(mapped: jax.Array, means: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """Squared distance of mapped gallery vectors to their class mean, or to the nearest where there are no labels.

    The score needs no new vector: a vector far from all that the map was fitted to is likely mapped badly.

    Args:
      mapped: Old vectors in the new space, ``[items, n]``.
      means: Means of the mapped vectors of each class, ``[classes, n]``.
      labels: Classes of the items, ``[items]`` integers.

    Returns:
      ``[items]``.
    """
    if labels is None:
        return linalg.nearest_rows(mapped, means, 1, block_size=_AT_A_TIME)[0][:, 0]
    return jnp.sum(jnp.square(mapped - means[labels]), axis=-1)


def backfill_order(mapped: jax.Array, means: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """Order in which to re-embed a gallery: items that the map serves worst come first.

    Arguments: see :func:`backfill_scores`.

    Returns:
      Indices of the items, ``[items]`` int32.
    """
    return jnp.argsort(-backfill_scores(mapped, means, labels)).astype(jnp.int32)


def check_pairs(h_old: jax.Array, h_new: jax.Array, labels: jax.Array | None = None) -> None:
    """Raises ValueError unless these are vectors of the same examples by two models, and their labels."""
    for name, h in (("old", h_old), ("new", h_new)):
        if h.ndim != 2 or 0 in h.shape:
            raise ValueError(f"{name}: expected vectors [examples, n], got shape {list(h.shape)}")
    if len(h_old) != len(h_new):
        raise ValueError(
            f"old, new: expected the vectors of the same examples in the same order, got {len(h_old)} old and "
            f"{len(h_new)} new vectors"
        )
    if labels is not None and labels.shape != h_old.shape[:1]:
        raise ValueError(f"labels: expected one of each pair, [{len(h_old)}], got shape {list(labels.shape)}")


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(x), axis=-1))
