"""Vision transformers in the files of Hugging Face: ViT, DeiT, DINOv2, and the towers of CLIP and SigLIP."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.interop.hf.vit_config import config_from_fields, fields_from_config
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.vision_tensors import table_tensors
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import vision_transformer_specs

__all__ = ["canonical_names", "config_from_fields", "convert", "fields_from_config", "tensor_layout"]

# See table_tensors.
_VIT = {
    "patch": "embeddings.patch_embeddings.projection",
    "layers/attn_norm": "encoder.layer.{}.layernorm_before",
    "layers/attn/q": "encoder.layer.{}.attention.attention.query",
    "layers/attn/k": "encoder.layer.{}.attention.attention.key",
    "layers/attn/v": "encoder.layer.{}.attention.attention.value",
    "layers/attn/out": "encoder.layer.{}.attention.output.dense",
    "layers/mlp_norm": "encoder.layer.{}.layernorm_after",
    "layers/mlp/up": "encoder.layer.{}.intermediate.dense",
    "layers/mlp/down": "encoder.layer.{}.output.dense",
    "norm": "layernorm",
    "pooler": "pooler.dense",
    "prefix/cls": ("embeddings.cls_token", 2),
    "prefix/distillation": ("embeddings.distillation_token", 2),
    "prefix/mask": ("embeddings.mask_token", 2),
    "position/embedding": ("embeddings.position_embeddings", 1),
}
_DINOV2 = {
    **{name: stored for name, stored in _VIT.items() if "mlp" not in name and name != "pooler"},
    "layers/attn_norm": "encoder.layer.{}.norm1",
    "layers/mlp_norm": "encoder.layer.{}.norm2",
    "layers/mlp/up": "encoder.layer.{}.mlp.fc1",
    "layers/mlp/down": "encoder.layer.{}.mlp.fc2",
    "layers/attn_gain/scale": ("encoder.layer.{}.layer_scale1.lambda1", 0),
    "layers/mlp_gain/scale": ("encoder.layer.{}.layer_scale2.lambda1", 0),
    "prefix/mask": ("embeddings.mask_token", 1),
    "prefix/registers": ("embeddings.register_tokens", 1),
}
_DINOV2_GATED = {
    **_DINOV2,
    "layers/mlp/gate": ("encoder.layer.{}.mlp.weights_in", (0, 2)),
    "layers/mlp/up": ("encoder.layer.{}.mlp.weights_in", (1, 2)),
    "layers/mlp/down": "encoder.layer.{}.mlp.weights_out",
}
TOWER_LAYERS = {
    "layers/attn_norm": "encoder.layers.{}.layer_norm1",
    "layers/attn/q": "encoder.layers.{}.self_attn.q_proj",
    "layers/attn/k": "encoder.layers.{}.self_attn.k_proj",
    "layers/attn/v": "encoder.layers.{}.self_attn.v_proj",
    "layers/attn/out": "encoder.layers.{}.self_attn.out_proj",
    "layers/mlp_norm": "encoder.layers.{}.layer_norm2",
    "layers/mlp/up": "encoder.layers.{}.mlp.fc1",
    "layers/mlp/down": "encoder.layers.{}.mlp.fc2",
}
_CLIP = {
    **TOWER_LAYERS,
    "patch": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "norm": "post_layernorm",
    "pool/attn/q": ("head.attention.in_proj_", (0, 3)),
    "pool/attn/k": ("head.attention.in_proj_", (1, 3)),
    "pool/attn/v": ("head.attention.in_proj_", (2, 3)),
    "pool/attn/out": "head.attention.out_proj",
    "pool/norm": "head.layernorm",
    "pool/mlp/up": "head.mlp.fc1",
    "pool/mlp/down": "head.mlp.fc2",
    "prefix/cls": ("embeddings.class_embedding", 0),
    "position/embedding": ("embeddings.position_embedding.weight", 0),
    "pool/probe": ("head.probe", 2),
}
# transformers 5 renames in memory, and writes the names that it read.
_NEW_SPELLING = (
    (re.compile(r"^layers\."), "encoder.layer."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
)
_NEW_SPELLING_MLP = (
    (re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."),
    (re.compile(r"\.mlp\.fc2\."), ".output.dense."),
)
_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")
_OTHER_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


def tensor_layout(config: VisionTransformerConfig) -> TensorLayout:
    """Returns the parameters with the tensors of a checkpoint.

    Raises:
      ValueError: Checkpoints of the family have no tensor for one of the parameters.
    """
    own = {"vit": _VIT, "deit": _VIT, "dinov2": _DINOV2, "clip": _CLIP, "siglip": _CLIP}.get(config.family, {})
    own = _DINOV2_GATED if config.family == "dinov2" and config.gated_mlp else own
    table = with_prefix(own, _prefix(config))
    table["head"] = "cls_classifier" if config.distilled_head else "classifier"
    table["head_distilled"] = "distillation_classifier"
    specs = vision_transformer_specs(config)
    return TensorLayout(specs, table_tensors(specs, table, f"{config.family!r} in layout 'hf'", config))


def with_prefix(table: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns a table of :func:`table_tensors` with a prefix before every name."""
    return {
        path: (prefix + stored[0], *stored[1:]) if isinstance(stored, tuple) else prefix + stored
        for path, stored in table.items()
    }


def canonical_names(config: VisionTransformerConfig, names: Iterable[str]) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_layout`, without the other tower and buffers.

    The names of transformers 4 and 5 are read, with and without a prefix.
    """
    found = {name: _canonical_name(config, name) for name in names}
    return {name: new for name, new in found.items() if new is not None}


def _canonical_name(config: VisionTransformerConfig, name: str) -> str | None:
    if config.family in ("clip", "siglip"):
        if name.startswith(_OTHER_TOWER) or name.endswith("embeddings.position_ids"):
            return None
        return name if name.startswith(("vision_model.", *_HEADS)) else f"vision_model.{name}"
    if name.startswith(_HEADS):
        return name
    name = re.sub(r"^(vit|deit|dinov2|dinov2_with_registers)\.", "", name)
    for pattern, old in _NEW_SPELLING + (() if config.family == "dinov2" else _NEW_SPELLING_MLP):
        name = pattern.sub(old, name)
    return _prefix(config) + name


def convert(config: VisionTransformerConfig, params: PyTree) -> tuple[VisionTransformerConfig, PyTree]:
    """Converts a model of timm, with the same logits at its image size.

    Fused kernels of queries, keys and values are split.  Where the libraries differ, the result follows transformers:
    in how positions are resampled, whether the tokens of CLIP are normalized, and what is pooled of a distilled DeiT.
    """
    if config.family == "dinov2" or config.architecture is None:
        return config, params
    changes: dict[str, Any] = {"antialias_positions": False, "fused_qkv": False, "architecture": None}
    if config.family == "clip" and config.pool == "token":
        changes["norm_at"] = "pooled"
    if config.distillation_token:
        changes["pool"] = "token"
    elif config.family == "deit":
        changes["family"] = "vit"
    attn = dict(params["layers"]["attn"])
    if config.fused_qkv:
        fused = attn.pop("qkv")
        for i, name in enumerate(("q", "k", "v")):
            attn[name] = jax.tree.map(lambda own, i=i: jnp.split(own, 3, axis=-1)[i], fused)
    return config.replace(**changes), {**params, "layers": {**params["layers"], "attn": attn}}


def _prefix(config: VisionTransformerConfig) -> str:
    if config.family in ("clip", "siglip"):
        return "vision_model."
    return f"{config.family}." if config.num_classes and config.family != "dinov2" else ""
