"""Neural network layers and models: pure functions of parameters, and Flax NNX modules over them.

Parameters have logical axis names; :mod:`subspace_jax.train` maps them to mesh axes.  The functions need no Flax: it is
imported with the first module.
"""

import importlib
from typing import TYPE_CHECKING

from subspace_jax.nn.families import (
    ModelFamily,
    VisionConfig,
    count_params,
    family_of,
    init_params,
    param_axes,
    param_shapes,
    param_specs,
    vision_apply,
)
from subspace_jax.nn.layers.attention import attention, causal_mask
from subspace_jax.nn.layers.batch_norm import batch_norm
from subspace_jax.nn.layers.conv import StructuredConv, conv
from subspace_jax.nn.layers.drop_path import drop_path, drop_path_rates
from subspace_jax.nn.layers.embedding import StructuredTable, check_tokens, embed, unembed
from subspace_jax.nn.layers.factored import LowRankFactor, SparseFactor, factored_axes, truncate_bf16
from subspace_jax.nn.layers.heads import cosine_logits, grassmann_logits, normalize, safe_norm
from subspace_jax.nn.layers.linear import StructuredKernel, linear
from subspace_jax.nn.layers.norms import group_norm, layer_norm, rms_norm
from subspace_jax.nn.layers.pooling import halve, max_pool, mean_pool
from subspace_jax.nn.layers.position_resampling import resample_positions
from subspace_jax.nn.layers.rope import Rope, apply_rope, rope_frequencies, rope_tables
from subspace_jax.nn.layers.sequence_attention import sequence_attention
from subspace_jax.nn.layers.stacking import LayerOptions, stack_layers, unstack_layers
from subspace_jax.nn.layers.structured import StructuredWeight
from subspace_jax.nn.models.bert.config import BertConfig
from subspace_jax.nn.models.bert.model import BertOutput, bert_apply, bert_specs
from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.first_layers import first_layer_params, first_layers
from subspace_jax.nn.models.causal_lm.generate import Generated, generate, keep_top_p
from subspace_jax.nn.models.causal_lm.kv_cache import KVCache, init_cache
from subspace_jax.nn.models.causal_lm.model import CausalLMOutput, causal_lm_apply, causal_lm_logits
from subspace_jax.nn.models.causal_lm.params import causal_lm_specs, untie_causal_lm
from subspace_jax.nn.models.causal_lm.stream import stream
from subspace_jax.nn.models.clip.dual_tower import (
    DualTowerConfig,
    dual_tower_apply,
    dual_tower_specs,
    encode_image,
    encode_prompts,
    encode_text,
    similarity,
)
from subspace_jax.nn.models.clip.text_tower import TextOutput, TextTowerConfig, text_tower_apply, text_tower_specs
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
from subspace_jax.nn.models.vit.model import vision_transformer_apply, vision_transformer_specs, with_image_size
from subspace_jax.nn.params import ParamSpec

if TYPE_CHECKING:
    from subspace_jax.nn.layers.modules import (
        BatchNorm,
        CosineHead,
        GrassmannHead,
        Linear,
        SoftmaxHead,
        SparseDictDense,
    )
    from subspace_jax.nn.models.small import MLP, ConvNet
    from subspace_jax.nn.module import Model

__all__ = [
    "MLP",
    "BatchNorm",
    "BertConfig",
    "BertOutput",
    "CausalLMConfig",
    "CausalLMOutput",
    "ConvNet",
    "CosineHead",
    "DualTowerConfig",
    "Generated",
    "GrassmannHead",
    "KVCache",
    "LayerOptions",
    "Linear",
    "LowRankFactor",
    "Model",
    "ModelFamily",
    "ParamSpec",
    "ResNetConfig",
    "Rope",
    "SoftmaxHead",
    "SparseDictDense",
    "SparseFactor",
    "StaticEmbeddingConfig",
    "StructuredConv",
    "StructuredKernel",
    "StructuredTable",
    "StructuredWeight",
    "SwinConfig",
    "TextOutput",
    "TextTowerConfig",
    "VGGConfig",
    "VisionConfig",
    "VisionOutput",
    "VisionTransformerConfig",
    "apply_rope",
    "attention",
    "batch_norm",
    "bert_apply",
    "bert_specs",
    "causal_lm_apply",
    "causal_lm_logits",
    "causal_lm_specs",
    "causal_mask",
    "check_tokens",
    "conv",
    "cosine_logits",
    "count_params",
    "drop_path",
    "drop_path_rates",
    "dual_tower_apply",
    "dual_tower_specs",
    "embed",
    "encode_image",
    "encode_prompts",
    "encode_text",
    "factored_axes",
    "family_of",
    "first_layer_params",
    "first_layers",
    "generate",
    "grassmann_logits",
    "group_norm",
    "halve",
    "init_cache",
    "init_params",
    "keep_top_p",
    "layer_norm",
    "linear",
    "max_pool",
    "mean_pool",
    "normalize",
    "param_axes",
    "param_shapes",
    "param_specs",
    "resample_positions",
    "resnet_apply",
    "resnet_specs",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "safe_norm",
    "sequence_attention",
    "similarity",
    "stack_layers",
    "static_embedding_apply",
    "static_embedding_specs",
    "stream",
    "swin_apply",
    "swin_specs",
    "text_tower_apply",
    "text_tower_specs",
    "truncate_bf16",
    "unembed",
    "unstack_layers",
    "untie_causal_lm",
    "vgg_apply",
    "vgg_specs",
    "vision_apply",
    "vision_transformer_apply",
    "vision_transformer_specs",
    "with_image_size",
]

_MODULES = {
    "BatchNorm": "layers.modules",
    "CosineHead": "layers.modules",
    "GrassmannHead": "layers.modules",
    "Linear": "layers.modules",
    "SoftmaxHead": "layers.modules",
    "SparseDictDense": "layers.modules",
    "ConvNet": "models.small",
    "MLP": "models.small",
    "Model": "module",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import subspace_jax._train_extra  # noqa: F401

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return __all__
