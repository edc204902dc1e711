"""CLIP-Adapter: a bottleneck beside the frozen features of images or texts.

Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters" (arXiv 2110.04544).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax import losses, nn
from subspace_jax.represent.few_shot_survey.fitting import fit_steps, sgd_of_coop
from subspace_jax.represent.few_shot_survey.prototypes import check_labels, check_widths, zero_shot_logits


class Shots(NamedTuple):
    """Labelled features.

    Attributes:
      features: ``[examples, n]``, floating point, as the encoder gives them.
      labels: ``[examples]`` integers.
    """

    features: jax.Array
    labels: jax.Array


class ClipAdapter(nnx.Module):
    """Blends features with a perceptron of them, ``ratio relu(relu(f down) up) + (1 - ratio) f``.

    The second ReLU is that of the authors' code.  It serves features of images, or prototypes of texts.

    Args:
      width: Width of the features, ``n``.
      reduction: The bottleneck has width ``n // reduction``.
      ratio: Share of the perceptron, in ``[0, 1]``; 0 leaves the features as they are.
      param_dtype: Dtype of the parameters.
      rngs: Random number generators; the ``params`` stream is used.

    Attributes:
      down: ``[n, n // reduction]``, drawn uniformly within ``1 / sqrt(n)``, as linear layers of PyTorch are.
      up: ``[n // reduction, n]``, likewise.

    Raises:
      ValueError: The bottleneck would have no width, or the ratio is out of range.
    """

    def __init__(
        self,
        width: int,
        *,
        reduction: int = 4,
        ratio: float = 0.2,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= reduction <= width:
            raise ValueError(f"reduction: expected 1 to {width}, the width, got {reduction}")
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio: expected a number in [0, 1], got {ratio}")
        inner = width // reduction
        self.ratio = ratio
        self.down = nnx.Param(_uniform(rngs.params(), width, inner, param_dtype), axes=("embed", "mlp"))
        self.up = nnx.Param(_uniform(rngs.params(), inner, width, param_dtype), axes=("mlp", "embed"))

    def __call__(self, features: jax.Array) -> jax.Array:
        """Adapts features ``[..., n]``, as the encoder gives them: not normalized."""
        hidden = jax.nn.relu(nn.linear(features, self.down.get_value()))
        return self.ratio * jax.nn.relu(nn.linear(hidden, self.up.get_value())) + (1.0 - self.ratio) * features


def fit_clip_adapter(
    adapter: ClipAdapter,
    shots: Shots,
    text: jax.Array,
    order: jax.Array,
    *,
    scale: float = 100.0,
    tx: optax.GradientTransformation | None = None,
) -> tuple[ClipAdapter, jax.Array]:
    """Trains an adapter of image features by the cross-entropy of the cosines to the prototypes.

    Args:
      adapter: The adapter to start from; it is left as it is.
      shots: Labelled features.
      text: Prototypes ``[classes, n]``.
      order: Indices of the examples of each step, ``[steps, batch]``; see :func:`batch_order`.
      scale: See :func:`zero_shot_logits`.
      tx: Optimizer; by default SGD with momentum 0.9 and weight decay 5e-4 from 0.002 to 0 along a cosine.  The same
        object compiles once.

    Returns:
      The trained adapter, and the mean loss before each step, ``[steps]``.

    Raises:
      ValueError: Shapes don't match, or a label is out of range.
    """
    check_widths(shots.features, text)
    check_labels(shots.features, shots.labels, text.shape[0])
    tx = sgd_of_coop(2e-3, len(order)) if tx is None else tx
    return fit_steps(_loss, tx, adapter, order, tuple(shots), (text, scale))


def _loss(adapter, batch, text, scale):
    features, labels = batch
    return jnp.mean(losses.cross_entropy(zero_shot_logits(adapter(features), text, scale), labels))


def _uniform(key, fan_in, fan_out, dtype):
    bound = fan_in**-0.5
    return jax.random.uniform(key, (fan_in, fan_out), dtype, -bound, bound)
