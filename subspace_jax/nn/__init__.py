"""Flax NNX modules, thin over pure functions.

Parameters carry logical axis names in their ``axes`` metadata; :mod:`subspace_jax.train` maps them to mesh axes.
"""

from subspace_jax.nn.layers.attention import attention, causal_mask
from subspace_jax.nn.layers.batch_norm import batch_norm
from subspace_jax.nn.layers.conv import StructuredConv, conv
from subspace_jax.nn.layers.drop_path import drop_path, drop_path_rates
from subspace_jax.nn.layers.embedding import StructuredTable, check_tokens, embed, unembed
from subspace_jax.nn.layers.heads import (
    CosineHead,
    GrassmannHead,
    SoftmaxHead,
    cosine_logits,
    grassmann_logits,
    normalize,
    safe_norm,
)
from subspace_jax.nn.layers.kv_cache import KVCache, init_cache
from subspace_jax.nn.layers.linear import Linear, StructuredKernel, linear
from subspace_jax.nn.layers.norms import layer_norm, rms_norm
from subspace_jax.nn.layers.pooling import halve, max_pool
from subspace_jax.nn.layers.position_resampling import resample_positions
from subspace_jax.nn.layers.rope import Rope, apply_rope, rope_frequencies, rope_tables
from subspace_jax.nn.layers.sequence_attention import sequence_attention
from subspace_jax.nn.layers.stacking import stack_layers, unstack_layers
from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.generate import Generated, generate, keep_top_p
from subspace_jax.nn.models.causal_lm.model import CausalLMOutput, causal_lm_apply, causal_lm_logits
from subspace_jax.nn.models.causal_lm.module import CausalLM
from subspace_jax.nn.models.causal_lm.params import (
    causal_lm_axes,
    causal_lm_init,
    causal_lm_shapes,
    causal_lm_specs,
    count_params,
    untie_causal_lm,
)
from subspace_jax.nn.models.clip.dual_tower import (
    DualTowerConfig,
    dual_tower_axes,
    dual_tower_init,
    dual_tower_shapes,
    dual_tower_specs,
    encode_image,
    encode_text,
    similarity,
)
from subspace_jax.nn.models.clip.text_tower import (
    TextOutput,
    TextTowerConfig,
    text_tower_apply,
    text_tower_axes,
    text_tower_init,
    text_tower_shapes,
    text_tower_specs,
)
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.resnet.model import resnet_apply, resnet_axes, resnet_init, resnet_shapes, resnet_specs
from subspace_jax.nn.models.small import MLP, ConvNet, group_norm
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.swin.model import swin_apply, swin_axes, swin_init, swin_shapes, swin_specs
from subspace_jax.nn.models.vgg import VGGConfig, vgg_apply, vgg_axes, vgg_init, vgg_specs
from subspace_jax.nn.models.vision_apply import vision_apply
from subspace_jax.nn.models.vision_modules import VGG, ResNet, SwinTransformer
from subspace_jax.nn.models.vision_output import VisionOutput
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import (
    VisionTransformer,
    vision_transformer_apply,
    vision_transformer_axes,
    vision_transformer_init,
    vision_transformer_shapes,
    vision_transformer_specs,
    with_image_size,
)
from subspace_jax.nn.params import ParamSpec

__all__ = [
    "MLP",
    "VGG",
    "CausalLM",
    "CausalLMConfig",
    "CausalLMOutput",
    "ConvNet",
    "CosineHead",
    "DualTowerConfig",
    "Generated",
    "GrassmannHead",
    "KVCache",
    "Linear",
    "ParamSpec",
    "ResNet",
    "ResNetConfig",
    "Rope",
    "SoftmaxHead",
    "StructuredConv",
    "StructuredKernel",
    "StructuredTable",
    "SwinConfig",
    "SwinTransformer",
    "TextOutput",
    "TextTowerConfig",
    "VGGConfig",
    "VisionOutput",
    "VisionTransformer",
    "VisionTransformerConfig",
    "apply_rope",
    "attention",
    "batch_norm",
    "causal_lm_apply",
    "causal_lm_axes",
    "causal_lm_init",
    "causal_lm_logits",
    "causal_lm_shapes",
    "causal_lm_specs",
    "causal_mask",
    "check_tokens",
    "conv",
    "cosine_logits",
    "count_params",
    "drop_path",
    "drop_path_rates",
    "dual_tower_axes",
    "dual_tower_init",
    "dual_tower_shapes",
    "dual_tower_specs",
    "embed",
    "encode_image",
    "encode_text",
    "generate",
    "grassmann_logits",
    "group_norm",
    "halve",
    "init_cache",
    "keep_top_p",
    "layer_norm",
    "linear",
    "max_pool",
    "normalize",
    "resample_positions",
    "resnet_apply",
    "resnet_axes",
    "resnet_init",
    "resnet_shapes",
    "resnet_specs",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "safe_norm",
    "sequence_attention",
    "similarity",
    "stack_layers",
    "swin_apply",
    "swin_axes",
    "swin_init",
    "swin_shapes",
    "swin_specs",
    "text_tower_apply",
    "text_tower_axes",
    "text_tower_init",
    "text_tower_shapes",
    "text_tower_specs",
    "unembed",
    "unstack_layers",
    "untie_causal_lm",
    "vgg_apply",
    "vgg_axes",
    "vgg_init",
    "vgg_specs",
    "vision_apply",
    "vision_transformer_apply",
    "vision_transformer_axes",
    "vision_transformer_init",
    "vision_transformer_shapes",
    "vision_transformer_specs",
    "with_image_size",
]
