"""``config.json`` of the vision transformers of Hugging Face, read and written."""

import contextlib
from typing import Any

from subspace_jax.interop.config_fields import (
    MAX_LAYERS,
    Fields,
    Shapes,
    dims,
    flag,
    group,
    integer,
    label_fields,
    naming,
    num_labels,
    number,
    pair,
    shown,
    square,
    word,
)
from subspace_jax.interop.hf.causal_lm_config import FROM_HF_ACTIVATION, TO_HF_ACTIVATION
from subspace_jax.nn.models.vit.config import VisionTransformerConfig, swiglu_size

MODEL_TYPES = {
    "vit": "vit",
    "deit": "deit",
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
_ARCHITECTURES = {
    "vit": {"ViTModel", "ViTForImageClassification"},
    "deit": {"DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"},
    "clip": {"CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"},
    "siglip": {"SiglipModel", "SiglipVisionModel", "SiglipForImageClassification"},
    "dinov2": {"Dinov2Model", "Dinov2Backbone", "Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"},
}
# Defaults of absent fields.
DEFAULTS = {
    "vit": {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "deit": {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "dinov2": {"patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
}
_COMMON = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "num_channels": 3,
}


def activation_from_hf(fields: Fields, name: str = "hidden_act", default: str | None = None) -> str:
    """Returns the activation that a field names."""
    known = {**FROM_HF_ACTIVATION, "quick_gelu": "quick_gelu"}
    return known[word(fields, name, default, known)]


def activation_to_hf(name: str) -> str:
    """Returns the name of an activation in Hugging Face configs; the inverse of :func:`activation_from_hf`."""
    return {**TO_HF_ACTIVATION, "quick_gelu": "quick_gelu"}[name]


def tower_fields(fields: Fields, tower: str, defaults: Fields) -> dict[str, Any]:
    """Returns the fields of one tower of a dual model, with defaults, by old and new names.

    Args:
      fields: Fields of ``config.json``, of a dual model or of a tower alone.
      tower: "vision" or "text".
      defaults: Defaults of absent fields.
    """
    if f"{tower}_config" not in fields and f"{tower}_config_dict" not in fields:
        return {**defaults, **fields}
    made, old = {**defaults, **group(fields, f"{tower}_config")}, group(fields, f"{tower}_config_dict")
    # Old files have the fields twice; the second copy counts, with its defaults.
    return made if fields.get(f"{tower}_config_dict") is None else {**made, **defaults, **old}


def config_from_fields(fields: Fields, shapes: Shapes | None = None) -> VisionTransformerConfig:
    """Converts the fields of ``config.json`` to a config; those of a dual model to that of its vision tower.

    Args:
      fields: The fields; absent ones have the defaults of the model type.
      shapes: Shape of every tensor; decides on a head, a pooler and a mask token where the fields leave them open.

    Raises:
      ValueError: The model type, its architecture or its activation is not supported, or sizes contradict one another.
    """
    kind = word(fields, "model_type", None, MODEL_TYPES)
    family = MODEL_TYPES[kind]
    architecture = _architecture(fields)
    if architecture and architecture not in _ARCHITECTURES[family]:
        raise ValueError(
            f"architectures: {architecture!r} is not supported; expected one of {sorted(_ARCHITECTURES[family])}"
        )
    defaults = {**_COMMON, **DEFAULTS[family]}
    if kind == "dinov2_with_registers":
        defaults |= {"patch_size": 16, "num_register_tokens": 4}
    own = tower_fields(fields, "vision", defaults) if family in ("clip", "siglip") else {**defaults, **fields}
    with naming("vision_config") if "vision_config" in fields else contextlib.nullcontext():
        made = _tower(family, own)
    labelled = not architecture or "ForImageClassification" in architecture
    if labelled and family in ("vit", "deit", "clip", "siglip"):
        made["num_classes"] = num_labels(fields)
    if family in ("vit", "deit"):
        made["qkv_bias"] = flag(own, "qkv_bias", True)
        made["pooler_activation"] = activation_from_hf(own, "pooler_act", "tanh")
        pooler = None if own.get("pooler_output_size") is None else integer(own, "pooler_output_size")
        if not labelled:
            made["pooler_size"] = pooler or made["width"]
        if family == "deit":
            made |= {"distillation_token": True, "distilled_head": architecture.endswith("WithTeacher")}
    elif family == "clip":
        made |= {"patch_bias": False, "pre_norm": True}
        made |= {"pool": "mean", "norm_at": "nothing"} if "num_classes" in made else {"norm_at": "pooled"}
        if not architecture:
            # A tower without a name has no head.
            made |= {"pool": "token", "norm_at": "pooled", "num_classes": 0}
    elif family == "siglip":
        head = flag(own, "vision_use_head", True)
        made |= {"class_token": False, "attention_pool": head, "pool": "attention" if head else "none"}
        if not architecture:
            made["num_classes"] = 0
        elif "num_classes" in made:
            made["pool"] = "mean"
    else:
        made |= _dinov2(own, made)
    config = VisionTransformerConfig(**made)
    return config if shapes is None else _with_tensors(config, fields, shapes)


def _tower(family: str, own: Fields) -> dict[str, Any]:
    """Fields of the towers of all families."""
    return {
        "family": family,
        "image_size": pair(own, "image_size", None),
        "patch_size": square(own, "patch_size", None),
        "width": integer(own, "hidden_size"),
        "num_layers": integer(own, "num_hidden_layers", most=MAX_LAYERS),
        "num_heads": integer(own, "num_attention_heads"),
        "mlp_size": integer(own, "intermediate_size"),
        "channels": integer(own, "num_channels"),
        "norm_eps": number(own, "layer_norm_eps", least=0, most=1),
        "activation": activation_from_hf(own),
    }


def _dinov2(own: Fields, made: Fields) -> dict[str, Any]:
    """Further fields of DINOv2."""
    registers = integer(own, "num_register_tokens", 0, least=0)
    ratio = number(own, "mlp_ratio", 4, most=1e6)
    gated = flag(own, "use_swiglu_ffn", False)
    return {
        "qkv_bias": flag(own, "qkv_bias", True),
        "layer_scale": True,
        "registers": registers,
        "antialias_positions": registers > 0,
        "gated_mlp": gated,
        "activation": "silu" if gated else made["activation"],
        "mlp_size": swiglu_size(made["width"], ratio) if gated else int(made["width"] * ratio),
        "mask_token": flag(own, "use_mask_token", True),
    }


def _with_tensors(config: VisionTransformerConfig, fields: Fields, shapes: Shapes) -> VisionTransformerConfig:
    """Adds to a config what ``config.json`` leaves open and the tensors show."""
    made = {"mask_token": any(name.endswith("mask_token") for name in shapes)}
    if config.family not in ("vit", "deit"):
        return config.replace(**made) if config.family == "dinov2" else config
    heads = "classifier.weight" in shapes or "cls_classifier.weight" in shapes
    pooler = next((dims(shapes, name, 2)[0] for name in shapes if name.endswith("pooler.dense.weight")), 0)
    if not _architecture(fields):
        made["num_classes"] = config.num_classes if heads else 0
        made["distilled_head"] = "distillation_classifier.weight" in shapes
        made["pooler_size"] = pooler
    elif config.pooler_size and not pooler:
        made["pooler_size"] = 0
    return config.replace(**made)


def fields_from_config(config: VisionTransformerConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``; classes are numbered."""
    family, labelled = config.family, config.num_classes > 0
    size = config.image_size
    fields: dict[str, Any] = {
        "model_type": family if family in ("vit", "deit", "dinov2") or labelled else f"{family}_vision_model",
        "dtype": dtype,
        "torch_dtype": dtype,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config.activation),
    }
    name = {"vit": "ViT", "deit": "DeiT", "clip": "CLIP", "siglip": "Siglip", "dinov2": "Dinov2"}.get(family, family)
    name += "Vision" if family in ("clip", "siglip") and not labelled else ""
    teacher = "WithTeacher" if config.distilled_head else ""
    architecture = f"{name}ForImageClassification{teacher}" if labelled else f"{name}Model"
    if family in ("vit", "deit"):
        fields |= {"qkv_bias": config.qkv_bias, "pooler_act": activation_to_hf(config.pooler_activation)}
        fields["pooler_output_size"] = config.pooler_size or config.width
    if family == "siglip":
        fields["vision_use_head"] = config.attention_pool
    if family == "dinov2":
        fields |= {
            "qkv_bias": config.qkv_bias,
            "mlp_ratio": 4 if config.gated_mlp else _ratio(config),
            "use_swiglu_ffn": config.gated_mlp,
            "hidden_act": "gelu" if config.gated_mlp else activation_to_hf(config.activation),
            "use_mask_token": config.mask_token,
        }
        if config.registers:
            fields |= {"model_type": "dinov2_with_registers", "num_register_tokens": config.registers}
            architecture = "Dinov2WithRegistersModel"
    if labelled and family in ("clip", "siglip"):
        own = {"model_type": f"{family}_vision_model", **{k: v for k, v in fields.items() if "dtype" not in k}}
        fields = {
            "dtype": dtype,
            "torch_dtype": dtype,
            "vision_config": {**own, "model_type": f"{family}_vision_model"},
        }
        fields["model_type"] = family
    if labelled:
        fields |= label_fields(config.num_classes)
    return {"architectures": [architecture], **fields}


def _ratio(config: VisionTransformerConfig) -> int | float:
    # An integer where it is one: transformers 5 refuses 4.0.
    whole, rest = divmod(config.mlp_size, config.width)
    return config.mlp_size / config.width if rest else whole


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"architectures: expected a list of names, got {shown(names)}")
    return names[0] if names else ""
