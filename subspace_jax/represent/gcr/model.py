"""A classifier: a backbone and a linear, cosine or Grassmann head."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from subspace_jax import nn
from subspace_jax.represent.gcr.backbones import VISION_BACKBONES, VisionBackbone
from subspace_jax.train.fields import check_choice

HEADS = ("softmax", "cosine", "grassmann")
BACKBONES = ("mlp", "convnet", *VISION_BACKBONES)
DTYPES = ("float64", "float32", "bfloat16", "float16")


class Classifier(nnx.Module):
    """A backbone and a head.

    Args:
      backbone: Module from inputs ``[batch, ...]`` to features ``[batch, n]``.
      head: Module from features to logits ``[batch, classes]``.
    """

    def __init__(self, backbone: nnx.Module, head: nnx.Module):
        self.backbone = backbone
        self.head = head

    def __call__(self, inputs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps inputs ``[batch, ...]`` to logits ``[batch, classes]``; ``key`` is for dropout in training mode."""
        keys = (key,) if isinstance(self.backbone, VisionBackbone) else ()
        return self.head(self.backbone(inputs, *keys))


def make_classifier(
    key: jax.Array,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    backbone: str = "mlp",
    features: Sequence[int] = (128, 64),
    head: str = "grassmann",
    dims: int | Sequence[int] = 8,
    gamma: float = 25.0,
    dtype: str = "float32",
    drop_path: float = 0.0,
) -> Classifier:
    """Builds a classifier.

    Args:
      key: Random key of the parameters.
      input_shape: Shape of one input, channels last.
      num_classes: Number of classes.
      backbone: "mlp", "convnet" or one of ``VISION_BACKBONES``, such as "resnet50d".
      features: Widths of the layers of "mlp" or stages of "convnet"; an "mlp" without layers is the identity.
      head: "softmax", "cosine" or "grassmann".
      dims: Dimension of the class subspaces, or one per class.
      gamma: Scale of the logits of the cosine and Grassmann heads.
      dtype: Dtype of the activations; parameters are float32.
      drop_path: Rate of stochastic depth, for networks that support it.

    Returns:
      The module.

    Raises:
      ValueError: A name is unknown, a width is below 1, the input is not an image where the backbone needs one, or the
        sizes of the head are invalid.
    """
    check_choice("model.dtype", dtype, DTYPES)
    check_choice("model.backbone", backbone, BACKBONES)
    check_choice("model.head", head, HEADS)
    if any(width < 1 for width in features):
        raise ValueError(f"model.features: expected widths of at least 1, got {tuple(features)}")
    if backbone != "mlp" and len(input_shape) != 3:
        raise ValueError(
            f"model.backbone: {backbone!r} expects images [height, width, channels], got shape {list(input_shape)}"
        )
    if drop_path and backbone not in VISION_BACKBONES:
        raise ValueError(f"model.drop_path: {backbone!r} has no stochastic depth, expected 0, got {drop_path}")
    rngs = nnx.Rngs(params=key)
    if backbone == "mlp":
        body = nn.MLP(math.prod(input_shape), features, dtype=dtype, rngs=rngs)
    elif backbone == "convnet":
        body = nn.ConvNet(input_shape[-1], features, dtype=dtype, rngs=rngs)
    else:
        body = VisionBackbone(backbone, input_shape, drop_path=drop_path, dtype=dtype, rngs=rngs)
    if head == "softmax":
        top = nn.SoftmaxHead(body.out_features, num_classes, rngs=rngs)
    elif head == "cosine":
        top = nn.CosineHead(body.out_features, num_classes, gamma=gamma, rngs=rngs)
    else:
        top = nn.GrassmannHead(body.out_features, num_classes, dims=dims, gamma=gamma, rngs=rngs)
    return Classifier(body, top)
