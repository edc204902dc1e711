"""Flax NNX modules, thin over pure functions.

Parameters carry logical axis names in their ``axes`` metadata; :mod:`subspace_jax.train` maps them to mesh axes.
"""

from subspace_jax.nn.attention import attention, causal_mask
from subspace_jax.nn.backbones import MLP, ConvNet, group_norm
from subspace_jax.nn.causal_lm import CausalLMOutput, causal_lm_apply, causal_lm_logits
from subspace_jax.nn.causal_lm_config import CausalLMConfig
from subspace_jax.nn.causal_lm_module import CausalLM
from subspace_jax.nn.causal_lm_params import (
    causal_lm_axes,
    causal_lm_init,
    causal_lm_shapes,
    causal_lm_specs,
    count_params,
)
from subspace_jax.nn.conv import StructuredConv, conv
from subspace_jax.nn.dual_tower import (
    DualTowerConfig,
    dual_tower_axes,
    dual_tower_init,
    dual_tower_shapes,
    dual_tower_specs,
    encode_image,
    encode_text,
    similarity,
)
from subspace_jax.nn.embedding import StructuredTable, check_tokens, embed, unembed
from subspace_jax.nn.generate import Generated, generate, keep_top_p
from subspace_jax.nn.heads import (
    CosineHead,
    GrassmannHead,
    SoftmaxHead,
    cosine_logits,
    grassmann_logits,
    normalize,
    safe_norm,
)
from subspace_jax.nn.kv_cache import KVCache, init_cache
from subspace_jax.nn.linear import Linear, StructuredKernel, linear
from subspace_jax.nn.norms import layer_norm, rms_norm
from subspace_jax.nn.param_specs import ParamSpec
from subspace_jax.nn.resample import resample_positions
from subspace_jax.nn.rope import Rope, apply_rope, rope_frequencies, rope_tables
from subspace_jax.nn.text_tower import (
    TextOutput,
    TextTowerConfig,
    text_tower_apply,
    text_tower_axes,
    text_tower_init,
    text_tower_shapes,
    text_tower_specs,
)
from subspace_jax.nn.vision_output import VisionOutput
from subspace_jax.nn.vision_transformer import (
    VisionTransformer,
    vision_transformer_apply,
    vision_transformer_axes,
    vision_transformer_init,
    vision_transformer_shapes,
    vision_transformer_specs,
    with_image_size,
)
from subspace_jax.nn.vision_transformer_config import VisionTransformerConfig

__all__ = [
    "MLP",
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
    "Rope",
    "SoftmaxHead",
    "StructuredConv",
    "StructuredKernel",
    "StructuredTable",
    "TextOutput",
    "TextTowerConfig",
    "VisionOutput",
    "VisionTransformer",
    "VisionTransformerConfig",
    "apply_rope",
    "attention",
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
    "init_cache",
    "keep_top_p",
    "layer_norm",
    "linear",
    "normalize",
    "resample_positions",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "safe_norm",
    "similarity",
    "text_tower_apply",
    "text_tower_axes",
    "text_tower_init",
    "text_tower_shapes",
    "text_tower_specs",
    "unembed",
    "vision_transformer_apply",
    "vision_transformer_axes",
    "vision_transformer_init",
    "vision_transformer_shapes",
    "vision_transformer_specs",
    "with_image_size",
]
