"""ImageNet networks as backbones of a classifier: from images to pooled features."""

import functools
from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax import nn

_RESNETS: dict[str, Callable[..., nn.ResNetConfig]] = {
    **{f"resnet{depth}": functools.partial(nn.ResNetConfig.resnet, depth) for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}d": functools.partial(nn.ResNetConfig.resnet_d, depth) for depth in (18, 34, 50, 101, 152)},
    "resnext50": nn.ResNetConfig.resnext50,
}
VISION_BACKBONES = (*_RESNETS, "vgg13_bn", "swin_tiny", "deit3_small")


class VisionBackbone(nnx.Module):
    """A network of :mod:`subspace_jax.nn` that returns its pooled features.

    A new module is in evaluation mode; ``train()`` and ``eval()`` switch.

    Args:
      name: One of :data:`VISION_BACKBONES`.
      input_shape: Height, width and channels of an image.
      drop_path: Rate of stochastic depth at the last block.
      dtype: Dtype of the activations.
      rngs: Random streams; ``params`` is used.

    Raises:
      ValueError: The name is unknown, the network does not support the image shape, or a VGG is given a ``drop_path``.
    """

    def __init__(
        self, name: str, input_shape: Sequence[int], *, drop_path: float = 0.0, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        size, fields = tuple(input_shape[:2]), {"num_classes": 0, "channels": input_shape[2]}
        if name in _RESNETS:
            config = _RESNETS[name](drop_path=drop_path, **fields)
        elif name == "vgg13_bn":
            if drop_path:
                raise ValueError(f"model.drop_path: {name!r} has no stochastic depth, expected 0, got {drop_path}")
            # Without the last dropout, as in the Grassmann study (arXiv 2308.01547).
            config = nn.VGGConfig(dropout=(0.5, 0.0), image_size=size, **fields)
        elif name == "swin_tiny":
            config = nn.SwinConfig.swin("tiny", image_size=size, drop_path=drop_path, **fields)
        elif name == "deit3_small":
            config = nn.VisionTransformerConfig.deit3("small", drop_path=drop_path, **fields).replace(image_size=size)
        else:
            raise ValueError(f"model.backbone: expected one of {VISION_BACKBONES}, got {name!r}")
        self.net = nn.Model(config, dtype=dtype, rngs=rngs)
        self.out_features = config.out_features

    def __call__(self, pixels: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Maps images ``[batch, height, width, channels]`` to features ``[batch, out_features]``.

        Args:
          pixels: Standardized images.
          key: Random key of dropout and stochastic depth in training mode.
        """
        return self.net(pixels, key=key).pooled
