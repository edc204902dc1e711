"""Model families by the type of their config: one record each, from which parameters, axes and modules follow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax.nn.models.bert.config import BertConfig
from subspace_jax.nn.models.bert.model import bert_apply, bert_specs
from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.model import causal_lm_apply
from subspace_jax.nn.models.causal_lm.params import causal_lm_specs
from subspace_jax.nn.models.clip.dual_tower import DualTowerConfig, dual_tower_apply, dual_tower_specs
from subspace_jax.nn.models.clip.text_tower import TextTowerConfig, text_tower_apply, text_tower_specs
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.resnet.model import resnet_apply, resnet_specs
from subspace_jax.nn.models.static_embedding.model import (
    StaticEmbeddingConfig,
    static_embedding_apply,
    static_embedding_specs,
)
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.swin.model import swin_apply, swin_specs
from subspace_jax.nn.models.vgg.config import VGGConfig
from subspace_jax.nn.models.vgg.model import vgg_apply, vgg_specs
from subspace_jax.nn.models.vision import VisionOutput
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import vision_transformer_apply, vision_transformer_specs
from subspace_jax.nn.params import draw_params, spec_axes, spec_count, spec_shapes

PyTree = Any
Config = Any
VisionConfig = VisionTransformerConfig | SwinConfig | ResNetConfig | VGGConfig


class ModelFamily(NamedTuple):
    """A model family.

    Attributes:
      specs: ``specs(config)`` returns a nested dict of :class:`ParamSpec`, of a stateful family the pair of those of
        parameters and running statistics.
      apply: ``apply(config, params, *inputs, **options)`` runs a model; running statistics follow ``params``.
      vision: Whether the model maps ``pixels`` to a :class:`VisionOutput`, with the options ``train``, ``key`` and
        ``dtype``.
      stateful: Whether there are running statistics.
    """

    specs: Callable[[Config], PyTree]
    apply: Callable[..., Any]
    vision: bool = False
    stateful: bool = False


FAMILIES: dict[type, ModelFamily] = {
    CausalLMConfig: ModelFamily(causal_lm_specs, causal_lm_apply),
    BertConfig: ModelFamily(bert_specs, bert_apply),
    StaticEmbeddingConfig: ModelFamily(static_embedding_specs, static_embedding_apply),
    TextTowerConfig: ModelFamily(text_tower_specs, text_tower_apply),
    DualTowerConfig: ModelFamily(dual_tower_specs, dual_tower_apply),
    VisionTransformerConfig: ModelFamily(vision_transformer_specs, vision_transformer_apply, vision=True),
    SwinConfig: ModelFamily(swin_specs, swin_apply, vision=True),
    ResNetConfig: ModelFamily(resnet_specs, resnet_apply, vision=True, stateful=True),
    VGGConfig: ModelFamily(vgg_specs, vgg_apply, vision=True, stateful=True),
}


def family_of(config: Config) -> ModelFamily:
    """Returns the family of a config.

    Raises:
      TypeError: No family has configs of this type.
    """
    if type(config) not in FAMILIES:
        raise TypeError(f"config: expected one of {[kind.__name__ for kind in FAMILIES]}, got {type(config).__name__}")
    return FAMILIES[type(config)]


def param_specs(config: Config) -> PyTree:
    """Returns the specs of the parameters of a model; of a ResNet or VGG, of parameters and running statistics.

    Args:
      config: Config of any model family.

    Returns:
      Nested dict of :class:`ParamSpec`, or two of them.  The layout is documented at the family's own function, such as
      :func:`causal_lm_specs`.
    """
    return family_of(config).specs(config)


def param_axes(config: Config) -> PyTree:
    """Returns the logical axis names of the parameters, as ``PartitionSpec`` in the layout of :func:`param_specs`."""
    return spec_axes(param_specs(config))


def param_shapes(config: Config, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns the parameters as ``ShapeDtypeStruct``; running statistics are float32."""
    if not family_of(config).stateful:
        return spec_shapes(param_specs(config), dtype)
    params, stats = param_specs(config)
    return spec_shapes(params, dtype), spec_shapes(stats, jnp.float32)


def init_params(key: jax.Array, config: Config, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Initializes the parameters of a model.

    Args:
      key: Random key.  A parameter's values depend on the key, its name and its shape only.
      config: Config of any model family.
      dtype: Dtype of the parameters; running statistics are float32.

    Returns:
      Nested dict of arrays; of a ResNet or VGG ``(params, batch_stats)``.

    Examples:
      >>> import jax
      >>> from subspace_jax import nn
      >>> params = nn.init_params(jax.random.key(0), nn.CausalLMConfig.tiny())
      >>> params["embed"]["embedding"].shape
      (256, 128)
    """
    if not family_of(config).stateful:
        return draw_params(key, param_specs(config), dtype)
    params, stats = param_specs(config)
    return draw_params(key, params, dtype), draw_params(key, stats, jnp.float32)


def count_params(config: Config) -> int:
    """Returns the number of parameters of a model, without running statistics."""
    specs = param_specs(config)
    return spec_count(specs[0] if family_of(config).stateful else specs)


def vision_apply(
    config: VisionConfig, params: PyTree, pixels: jax.Array, *, resample: bool = False, **options: Any
) -> VisionOutput:
    """Runs a vision model of any family: vision transformer, Swin transformer, ResNet or VGG.

    Args:
      config: The model.
      params: Its parameters, as :func:`subspace_jax.interop.load_vision` returns them; of a ResNet or VGG
        ``{"params": ..., "batch_stats": ...}``.
      pixels: Images ``[batch, height, width, channels]``, standardized, floating point.
      resample: Whether a vision transformer resamples its position embeddings for images of another size.
      **options: Further arguments of the family's function, such as :func:`resnet_apply`; all take ``train``, ``key``
        and ``dtype``.

    Returns:
      The output, as far as the family provides it.

    Raises:
      TypeError: ``config`` is not that of a vision model, or an option is unknown.
      ValueError: The images don't match the model, or running statistics are missing.
    """
    family = family_of(config)
    if not family.vision:
        raise TypeError(f"config: expected a vision model, got {type(config).__name__}")
    if isinstance(config, VisionTransformerConfig):
        options["resample"] = resample
    if not family.stateful:
        return family.apply(config, params, pixels, **options)
    if set(params) != {"params", "batch_stats"}:
        raise ValueError(f"params: expected params and batch_stats, got {sorted(params)}")
    return family.apply(config, params["params"], params["batch_stats"], pixels, **options)
