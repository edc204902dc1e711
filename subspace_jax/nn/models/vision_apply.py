"""One call for every vision backbone, whatever its family."""

from collections.abc import Callable
from typing import Any

import jax

from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.resnet.model import resnet_apply
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.swin.model import swin_apply
from subspace_jax.nn.models.vgg import VGGConfig, vgg_apply
from subspace_jax.nn.models.vision_output import VisionOutput
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import vision_transformer_apply

PyTree = Any
VisionConfig = VisionTransformerConfig | SwinConfig | ResNetConfig | VGGConfig

_WITH_STATISTICS: dict[type, Callable[..., VisionOutput]] = {ResNetConfig: resnet_apply, VGGConfig: vgg_apply}


def vision_apply(
    config: VisionConfig, params: PyTree, pixels: jax.Array, *, resample: bool = False, **options: Any
) -> VisionOutput:
    """Runs a vision transformer, a Swin transformer, a residual network or a VGG, as the type of its config says.

    Args:
      config: The model.
      params: Its parameters, as :func:`subspace_jax.interop.load_vision` gives them; of a residual network or a VGG
        ``{"params": ..., "batch_stats": ...}``.
      pixels: Images ``[batch, height, width, channels]``, standardised, floating point.
      resample: Whether a vision transformer resamples its positions for images of another size; the other families
        have none to resample.
      **options: Of the family's own function, :func:`vision_transformer_apply`, :func:`swin_apply`,
        :func:`resnet_apply` or :func:`vgg_apply`; ``train``, ``key`` and ``dtype`` are known to all.

    Returns:
      What the family has of :class:`VisionOutput`.

    Raises:
      TypeError: The config is of another type, or the family does not know an option.
      ValueError: The images don't fit the model, or running statistics are missing.
    """
    if isinstance(config, VisionTransformerConfig):
        return vision_transformer_apply(config, params, pixels, resample=resample, **options)
    if isinstance(config, SwinConfig):
        return swin_apply(config, params, pixels, **options)
    if type(config) not in _WITH_STATISTICS:
        known = [kind.__name__ for kind in (VisionTransformerConfig, SwinConfig, *_WITH_STATISTICS)]
        raise TypeError(f"config: expected one of {known}, got {type(config).__name__}")
    if set(params) != {"params", "batch_stats"}:
        raise ValueError(f"params: expected params and batch_stats, got {sorted(params)}")
    return _WITH_STATISTICS[type(config)](config, params["params"], params["batch_stats"], pixels, **options)
