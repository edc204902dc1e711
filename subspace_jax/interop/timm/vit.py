"""Vision transformers in the files of timm, and DINOv2 in those of Meta."""

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.interop.config_fields import (
    Fields,
    Shapes,
    check_timm_sizes,
    dims,
    group,
    integer,
    shown,
    timm_image_size,
    word,
)
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.vision_tensors import table_tensors
from subspace_jax.nn.models.vit.config import VisionTransformerConfig
from subspace_jax.nn.models.vit.model import vision_transformer_specs

_SIZE = "tiny|small|medium|base|large|huge|giant|gigantic|so400m|giantopt"
_NAMES = re.compile(
    rf"vit_(?:{_SIZE})_patch\d+_(?P<kind>clip_(?:quickgelu_)?|siglip_)?\d+"
    rf"|(?P<deit>deit3?)_(?:{_SIZE})_(?:distilled_)?patch\d+_\d+"
)
_TANH = re.compile(r"vit_(base_patch32_siglip|large_patch16_siglip_512$|so400m_patch16_siglip|giantopt_.*siglip)")
# What model_args may hold: what the tensors show, and what changes no forward pass in evaluation.
_HARMLESS = {
    "attn_drop_rate",
    "class_token",
    "depth",
    "drop_path_rate",
    "drop_rate",
    "dynamic_img_size",
    "embed_dim",
    "fc_norm",
    "global_pool",
    "img_size",
    "in_chans",
    "init_values",
    "mlp_ratio",
    "no_embed_class",
    "num_classes",
    "num_heads",
    "patch_drop_rate",
    "patch_size",
    "pos_drop_rate",
    "pre_norm",
    "pretrained",
    "proj_drop_rate",
    "qkv_bias",
    "strict_img_size",
    "weight_init",
}
_POOLS = {"token": "token", "avg": "mean", "map": "attention", "": "none"}
_WIDE_HEADS = (1152, 1280, 1408, 1536, 1664)
# See table_tensors.
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


def config_from_fields(fields: Fields, shapes: Shapes) -> VisionTransformerConfig:
    """Converts ``config.json`` to a config; the sizes come from the tensors.

    Args:
      fields: The fields.
      shapes: Shape of every tensor.

    Raises:
      ValueError: The architecture is not one of those that are known to have the same equations, or tensors are
        missing.
    """
    architecture = str(fields.get("architecture")).split(".")[0]
    found = _NAMES.fullmatch(architecture)
    if not found:
        raise ValueError(
            f"architecture: {architecture!r} is not supported; expected a ViT, CLIP, SigLIP, DeiT or DeiT3 of timm"
        )
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"architecture {architecture!r}: the tensors {missing} are missing")
    arguments = group(fields, "model_args")
    if unknown := sorted(arguments.keys() - _HARMLESS):
        raise ValueError(f"model_args: {shown(unknown)} may change what the model computes, and are not supported")
    given = {**fields, **arguments}
    kind = found["kind"] or ""
    width, channels, patch, _ = dims(shapes, "patch_embed.proj.weight", 4)
    family = found["deit"] or ("clip" if kind.startswith("clip") else kind.rstrip("_") or "vit")
    tokens = {"class_token": "cls_token" in shapes, "distillation_token": "dist_token" in shapes}
    positioned = family != "deit3"
    rows = dims(shapes, "pos_embed", 3)[1] - (sum(tokens.values()) if positioned else 0)
    pool = _POOLS[word(given, "global_pool", "token", _POOLS)]
    if pool == "token" and tokens["distillation_token"]:
        pool = "distilled"
    activation = "quick_gelu" if "quickgelu" in architecture else "gelu"
    config = VisionTransformerConfig(
        family=family,
        image_size=_image_size(fields, rows, patch),
        patch_size=patch,
        width=width,
        num_layers=sum(name.endswith(".attn.qkv.weight") for name in shapes),
        num_heads=integer(given, "num_heads", 16 if width in _WIDE_HEADS else max(width // 64, 1)),
        mlp_size=dims(shapes, "blocks.0.mlp.fc1.weight", 2)[0],
        num_classes=dims(shapes, "head.weight", 2)[0] if "head.weight" in shapes else 0,
        channels=channels,
        norm_eps=1e-5 if family == "clip" else 1e-6,
        activation="gelu_tanh" if _TANH.match(architecture) else activation,
        fused_qkv=True,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        layer_scale=any(name in shapes for name in ("blocks.0.ls1.gamma", "blocks.0.gamma_1")),
        patch_bias="norm_pre.weight" not in shapes,
        **tokens,
        class_position=positioned,
        pre_norm="norm_pre.weight" in shapes,
        norm_at="pooled" if "fc_norm.weight" in shapes else "tokens",
        pool=pool,
        attention_pool="attn_pool.latent" in shapes,
        distilled_head="head_dist.weight" in shapes,
        antialias_positions=True,
        architecture=architecture,
    )
    check_timm_sizes(
        fields,
        (config.mlp_size, width),
        embed_dim=width,
        depth=config.num_layers,
        patch_size=patch,
        in_chans=channels,
        num_classes=config.num_classes,
        class_token=config.class_token,
        pre_norm=config.pre_norm,
        qkv_bias=config.qkv_bias,
    )
    return config


def fields_from_config(config: VisionTransformerConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``, without those of preprocessing."""
    del dtype
    if config.family == "dinov2":
        raise ValueError("layout: DINOv2 is written in layout 'hf'; that of timm may have other equations")
    pool = {"mean": "avg", "attention": "map", "none": ""}.get(config.pool, "token")
    arguments = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_size / config.width,
        "num_classes": config.num_classes,
        "in_chans": config.channels,
        "global_pool": pool,
    }
    return {
        "architecture": config.architecture or _architecture(config),
        "num_classes": config.num_classes,
        "num_features": config.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, *config.image_size],
            "fixed_input_size": True,
            "num_classes": config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distilled_head else "head",
        },
    }


def tensor_layout(config: VisionTransformerConfig) -> TensorLayout:
    """Returns the parameters with the tensors of a checkpoint; of DINOv2 by the names of Meta.

    Raises:
      ValueError: Checkpoints have no tensor for one of the parameters.
    """
    table = _TIMM_GATED if config.gated_mlp else _TIMM
    table = {**table, "norm": "fc_norm"} if config.norm_at == "pooled" else table
    specs = vision_transformer_specs(config)
    return TensorLayout(specs, table_tensors(specs, table, f"{config.family!r} in layout 'timm'", config))


def canonical_names(config: VisionTransformerConfig, names: Iterable[str]) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_layout`, without unused layers."""
    del config
    used = [name for name in names if not name.startswith("pre_logits.")]
    return {name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name) for name in used}


def convert(config: VisionTransformerConfig, params: PyTree) -> tuple[VisionTransformerConfig, PyTree]:
    """Converts a model of Hugging Face, with the same logits at its image size.

    Kernels of queries, keys and values are fused.  Where the libraries differ, the result follows timm: see
    :func:`subspace_jax.interop.hf.vit.convert`.
    """
    if config.family == "dinov2" or config.architecture is not None:
        return config, params
    changes: dict[str, Any] = {"antialias_positions": True, "fused_qkv": True, "architecture": None}
    if config.family == "clip" and config.pool == "token":
        changes["norm_at"] = "tokens"
    if config.distillation_token:
        changes["pool"] = "distilled"
    attn = dict(params["layers"]["attn"])
    if not config.fused_qkv:
        parts = [attn.pop(name) for name in ("q", "k", "v")]
        attn["qkv"] = jax.tree.map(lambda *own: jnp.concatenate(own, axis=-1), *parts)
    return config.replace(**changes), {**params, "layers": {**params["layers"], "attn": attn}}


def _architecture(config: VisionTransformerConfig) -> str:
    if config.family in ("deit", "deit3"):
        return f"{config.family}_base_{'distilled_' if config.distillation_token else ''}patch16_224"
    if config.family == "siglip" and config.activation == "gelu_tanh":
        return "vit_so400m_patch16_siglip_256"
    kind = {"clip": "clip_", "siglip": "siglip_"}.get(config.family, "")
    return f"vit_base_patch16_{kind}{'quickgelu_' if config.activation == 'quick_gelu' else ''}224"


def _image_size(fields: Fields, rows: int, patch: int) -> tuple[int, int]:
    """Returns the size of the fields if it fits the positions, otherwise a square."""
    size, side = timm_image_size(fields), math.isqrt(max(rows, 0))
    if size is not None and (size[0] // patch) * (size[1] // patch) == rows:
        return size
    if "img_size" in group(fields, "model_args"):
        raise ValueError(f"img_size: the tensors have {rows} positions of patches of {patch}, got {shown(size)}")
    if side * side == rows and side:
        return side * patch, side * patch
    raise ValueError(f"pos_embed: {rows} positions are no square, and config.json names no image size that fits")
