"""Names of the tensors of vision transformers in Hugging Face's and timm's checkpoints, and their places here."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.interop.hf.names import Place, TensorName
from subspace_jax.interop.hf.vit_config import (
    complete,
    config_from_hf,
    config_to_hf,
)
from subspace_jax.interop.timm.vit import config_from_timm, config_to_timm
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import vision_transformer_specs as specs

__all__ = [
    "canonical_name",
    "complete",
    "config_from_hf",
    "config_from_timm",
    "config_to_hf",
    "config_to_timm",
    "converted",
    "specs",
    "tensor_names",
]

PyTree = Any

# Where a module is stored: its name, or the name and which of how many blocks of rows of it; a name that ends in "_"
# takes its suffix without a dot.  Single arrays, at the end of each table, have their leading axes of size 1 counted.
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
_TIMM = {
    "patch": "patch_embed.proj",
    "pre_norm": "norm_pre",
    "layers/attn_norm": "blocks.{}.norm1",
    "layers/attn/qkv": "blocks.{}.attn.qkv",
    "layers/attn/q": ("blocks.{}.attn.qkv", (0, 3)),
    "layers/attn/k": ("blocks.{}.attn.qkv", (1, 3)),
    "layers/attn/v": ("blocks.{}.attn.qkv", (2, 3)),
    "layers/attn/out": "blocks.{}.attn.proj",
    "layers/mlp_norm": "blocks.{}.norm2",
    "layers/mlp/up": "blocks.{}.mlp.fc1",
    "layers/mlp/down": "blocks.{}.mlp.fc2",
    "norm": "norm",
    "pool/attn/q": "attn_pool.q",
    "pool/attn/k": ("attn_pool.kv", (0, 2)),
    "pool/attn/v": ("attn_pool.kv", (1, 2)),
    "pool/attn/out": "attn_pool.proj",
    "pool/norm": "attn_pool.norm",
    "pool/mlp/up": "attn_pool.mlp.fc1",
    "pool/mlp/down": "attn_pool.mlp.fc2",
    "head": "head",
    "head_distilled": "head_dist",
    "layers/attn_gain/scale": ("blocks.{}.ls1.gamma", 0),
    "layers/mlp_gain/scale": ("blocks.{}.ls2.gamma", 0),
    "prefix/cls": ("cls_token", 2),
    "prefix/distillation": ("dist_token", 2),
    "prefix/mask": ("mask_token", 1),
    "prefix/registers": ("register_tokens", 1),
    "position/embedding": ("pos_embed", 1),
    "pool/probe": ("attn_pool.latent", 2),
}
_TIMM_GATED = {
    **_TIMM,
    "layers/mlp/gate": ("blocks.{}.mlp.w12", (0, 2)),
    "layers/mlp/up": ("blocks.{}.mlp.w12", (1, 2)),
    "layers/mlp/down": "blocks.{}.mlp.w3",
}
# transformers 5 renames in memory, and writes what it read.
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


def tensor_names(config: VisionTransformerConfig, layout: str = "hf") -> list[TensorName]:
    """Lists every tensor of a checkpoint, with its place here; those of a stacked array in the order of layers.

    Args:
      config: The model.
      layout: "hf", or "timm", which for DINOv2 means Meta's own names.

    Raises:
      ValueError: Checkpoints of the family and layout have no tensor for one of the parameters.
    """
    return table_tensors(specs(config), _table(config, layout), f"{config.family!r} in layout {layout!r}", config)


def table_tensors(
    tree: PyTree, table: dict[str, Any], what: str, config: VisionTransformerConfig | None = None
) -> list[TensorName]:
    """Lists the tensors of a model by a table of modules and single arrays.

    Args:
      tree: Its specs.
      table: Path of a module to its name, or to its name and a part; path of a single array to its name and how many
        leading axes of size 1 it has more than ours has (or less, for a token of one row).
      what: The model, for the message.
      config: Gives the shape of the patch kernel.
    """
    tensors, left = [], []

    def add(path: tuple[str, ...], spec: Any, layer: int | None):
        own = spec.shape if layer is None else spec.shape[1:]
        place, key, module = Place(path, layer), "/".join(path), "/".join(path[:-1])
        if key in table:
            name, ones = table[key]
            # A token is one row here, and in files a vector below so many axes.
            token = path[0] in ("prefix", "pool") and path[-1] != "registers"
            shape = (1,) * ones + (own[-1:] if token else own)
            tensors.append(TensorName(name.format(layer), place, False, _keep(shape), shape))
        elif module in table:
            name, part = table[module] if isinstance(table[module], tuple) else (table[module], (0, 1))
            suffix = "bias" if path[-1] == "bias" else "weight"
            name = f"{name}{suffix}" if name.endswith("_") else f"{name}.{suffix}"
            conv = path == ("patch", "kernel") and config is not None
            shape = (own[1], config.channels, config.patch_size, config.patch_size) if conv else None
            order = (2, 3, 1, 0) if conv else None
            tensors.append(TensorName(name.format(layer), place, path[-1] == "kernel", order, shape, part))
        else:
            left.append(key)

    def walk(node: Any, path: tuple[str, ...]):
        if isinstance(node, dict):
            for name, part in node.items():
                walk(part, (*path, name))
            return
        stacked = path[0] == "layers"
        for layer in range(node.shape[0]) if stacked else [None]:
            add(path, node, layer)

    walk(tree, ())
    if left:
        raise ValueError(f"{what} has no tensors for {sorted(set(left))}")
    return tensors


def canonical_name(config: VisionTransformerConfig, name: str, layout: str) -> str | None:
    """The name that :func:`tensor_names` gives to a tensor that a file may call otherwise; None for one to ignore.

    Args:
      config: The model.
      name: The name in the file.
      layout: "hf" or "timm".
    """
    if layout == "timm":
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        return None if name.startswith("pre_logits.") else name
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


def converted(config: VisionTransformerConfig, params: PyTree, layout: str) -> tuple[VisionTransformerConfig, PyTree]:
    """Brings a model into the form that checkpoints of a layout have, without changing its logits at its size.

    Kernels of queries, keys and values are fused or taken apart.  Where the two libraries differ the result does as its
    own: in how positions are resampled, whether CLIP's tokens are normalised, and what is pooled of a distilled DeiT.

    Args:
      config: The model.
      params: Its parameters.
      layout: "hf" or "timm".
    """
    timm = layout == "timm"
    if config.family == "dinov2" or timm == (config.architecture is not None):
        return config, params
    changes: dict[str, Any] = {"antialias_positions": timm, "fused_qkv": timm, "architecture": None}
    if config.family == "clip" and config.pool == "token":
        changes["norm_at"] = "tokens" if timm else "pooled"
    if config.distillation_token:
        changes["pool"] = "distilled" if timm else "token"
    if config.family == "deit" and not timm and not config.distillation_token:
        changes["family"] = "vit"
    attn = dict(params["layers"]["attn"])
    if timm and not config.fused_qkv:
        parts = [attn.pop(name) for name in ("q", "k", "v")]
        attn["qkv"] = jax.tree.map(lambda *own: jnp.concatenate(own, axis=-1), *parts)
    elif not timm and config.fused_qkv:
        fused = attn.pop("qkv")
        for i, name in enumerate(("q", "k", "v")):
            attn[name] = jax.tree.map(lambda own, i=i: jnp.split(own, 3, axis=-1)[i], fused)
    return config.replace(**changes), {**params, "layers": {**params["layers"], "attn": attn}}


def _table(config: VisionTransformerConfig, layout: str) -> dict[str, Any]:
    if layout not in ("hf", "timm"):
        raise ValueError(f"layout: expected 'hf' or 'timm', got {layout!r}")
    if layout == "timm":
        table = _TIMM_GATED if config.gated_mlp else _TIMM
        return {**table, "norm": "fc_norm"} if config.norm_at == "pooled" else table
    own = {"vit": _VIT, "deit": _VIT, "dinov2": _DINOV2, "clip": _CLIP, "siglip": _CLIP}.get(config.family, {})
    own = _DINOV2_GATED if config.family == "dinov2" and config.gated_mlp else own
    prefix = _prefix(config)
    table = {}
    for path, stored in own.items():
        table[path] = (prefix + stored[0], stored[1]) if isinstance(stored, tuple) else prefix + stored
    table["head"] = "cls_classifier" if config.distilled_head else "classifier"
    table["head_distilled"] = "distillation_classifier"
    return table


def _prefix(config: VisionTransformerConfig) -> str:
    if config.family in ("clip", "siglip"):
        return "vision_model."
    return f"{config.family}." if config.num_classes and config.family != "dinov2" else ""


def _keep(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape)))
