"""Configs of vision transformers from ``config.json`` of Hugging Face and timm, and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

from subspace_jax.interop.hf_config import FROM_HF_ACTIVATION, TO_HF_ACTIVATION
from subspace_jax.nn.vision_transformer_config import VisionTransformerConfig, swiglu_size

Fields = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

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
# What a field is where config.json lacks it.
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

_SIZE = "tiny|small|medium|base|large|huge|giant|gigantic|so400m|giantopt"
_TIMM = re.compile(
    rf"vit_(?:{_SIZE})_patch\d+_(?P<kind>clip_(?:quickgelu_)?|siglip_)?\d+"
    rf"|(?P<deit>deit3?)_(?:{_SIZE})_(?:distilled_)?patch\d+_\d+"
)
_TANH = re.compile(r"vit_(base_patch32_siglip|large_patch16_siglip_512$|so400m_patch16_siglip|giantopt_.*siglip)")
_WIDE_HEADS = (1152, 1280, 1408, 1536, 1664)


def activation_from_hf(name: str) -> str:
    """Hugging Face's name of an activation to ours."""
    known = {**FROM_HF_ACTIVATION, "quick_gelu": "quick_gelu"}
    if name not in known:
        raise ValueError(f"hidden_act: {name!r} is not supported; expected one of {sorted(known)}")
    return known[name]


def activation_to_hf(name: str) -> str:
    """The inverse of :func:`activation_from_hf`."""
    return {**TO_HF_ACTIVATION, "quick_gelu": "quick_gelu"}[name]


def tower_fields(fields: Fields, tower: str, defaults: Fields) -> dict[str, Any]:
    """The fields of one tower of a dual model, old spelling included, completed with defaults.

    Args:
      fields: Those of ``config.json``; of a tower alone its own.
      tower: "vision" or "text".
      defaults: What a field is where it is absent.
    """
    if f"{tower}_config" not in fields and f"{tower}_config_dict" not in fields:
        return {**defaults, **fields}
    made = {**defaults, **(fields.get(f"{tower}_config") or {})}
    old = fields.get(f"{tower}_config_dict")
    # Old files carry the fields twice, and their second copy counts, its defaults as well.
    return made if old is None else {**made, **defaults, **old}


def config_from_hf(fields: Fields) -> VisionTransformerConfig:
    """Turns the fields of a Hugging Face ``config.json`` into a config; a dual model's into that of its vision tower.

    Whether there is a head, a pooler or a mask token is not in the fields if ``architectures`` is absent, or not at
    all; :func:`complete` looks at the tensors for it.

    Args:
      fields: The fields; what is absent has the default of its model type.

    Returns:
      The config.

    Raises:
      ValueError: The model type, its architecture or its activation is not supported, or sizes contradict one another.
    """
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type: {kind!r} is no vision transformer; expected one of {sorted(MODEL_TYPES)}")
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
    width = own["hidden_size"]
    made = {
        "family": family,
        "image_size": _pair(own["image_size"]),
        "patch_size": _square("patch_size", own["patch_size"]),
        "width": width,
        "num_layers": own["num_hidden_layers"],
        "num_heads": own["num_attention_heads"],
        "mlp_size": own["intermediate_size"],
        "channels": own["num_channels"],
        "norm_eps": float(own["layer_norm_eps"]),
        "activation": activation_from_hf(own["hidden_act"]),
    }
    labelled = not architecture or "ForImageClassification" in architecture
    if labelled and family in ("vit", "deit", "clip", "siglip"):
        made["num_classes"] = _num_labels(fields)
    if family in ("vit", "deit"):
        made["qkv_bias"] = own.get("qkv_bias", True)
        made["pooler_activation"] = activation_from_hf(own.get("pooler_act") or "tanh")
        if not labelled:
            made["pooler_size"] = own.get("pooler_output_size") or width
        if family == "deit":
            made |= {"distillation_token": True, "distilled_head": architecture.endswith("WithTeacher")}
    elif family == "clip":
        made |= {"patch_bias": False, "pre_norm": True}
        made |= {"pool": "mean", "norm_at": "nothing"} if "num_classes" in made else {"norm_at": "pooled"}
        if not architecture:
            # Of a tower without a name nobody expects a head.
            made |= {"pool": "token", "norm_at": "pooled", "num_classes": 0}
    elif family == "siglip":
        head = own.get("vision_use_head", True)
        made |= {"class_token": False, "attention_pool": head, "pool": "attention" if head else "none"}
        if not architecture:
            made["num_classes"] = 0
        elif "num_classes" in made:
            made["pool"] = "mean"
    else:
        registers = own.get("num_register_tokens", 0)
        ratio = own.get("mlp_ratio", 4)
        gated = bool(own.get("use_swiglu_ffn", False))
        made |= {
            "qkv_bias": own.get("qkv_bias", True),
            "layer_scale": True,
            "registers": registers,
            "antialias_positions": registers > 0,
            "gated_mlp": gated,
            "activation": "silu" if gated else made["activation"],
            "mlp_size": swiglu_size(width, ratio) if gated else int(width * ratio),
            "mask_token": own.get("use_mask_token", True),
        }
    return VisionTransformerConfig(**made)


def complete(config: VisionTransformerConfig, fields: Fields, shapes: Shapes) -> VisionTransformerConfig:
    """Adds to a config what ``config.json`` leaves open and the tensors of the checkpoint tell.

    Args:
      config: What :func:`config_from_hf` or :func:`config_from_timm` made of the fields.
      fields: The fields.
      shapes: Name to shape of the tensors.
    """
    if "model_type" not in fields:
        return config
    made = {"mask_token": any(name.endswith("mask_token") for name in shapes)}
    if config.family not in ("vit", "deit"):
        return config.replace(**made) if config.family == "dinov2" else config
    heads = "classifier.weight" in shapes or "cls_classifier.weight" in shapes
    pooler = next((shape[0] for name, shape in shapes.items() if name.endswith("pooler.dense.weight")), 0)
    if not _architecture(fields):
        made["num_classes"] = config.num_classes if heads else 0
        made["distilled_head"] = "distillation_classifier.weight" in shapes
        made["pooler_size"] = pooler
    elif config.pooler_size and not pooler:
        made["pooler_size"] = 0
    return config.replace(**made)


def config_from_timm(fields: Fields, shapes: Shapes) -> VisionTransformerConfig:
    """Makes a config of timm's ``config.json`` and, since that has no sizes, of the shapes of the tensors.

    Args:
      fields: The fields.
      shapes: Name to shape of the tensors.

    Returns:
      The config.

    Raises:
      ValueError: The architecture is none of those whose equations are known to be ours, or tensors are missing.
    """
    architecture = str(fields.get("architecture")).split(".")[0]
    found = _TIMM.fullmatch(architecture)
    if not found:
        raise ValueError(
            f"architecture: {architecture!r} is not supported; expected a ViT, CLIP, SigLIP, DeiT or DeiT3 of timm"
        )
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"architecture {architecture!r}: the tensors {missing} are missing")
    given = {**fields, **(fields.get("model_args") or {})}
    kind = found["kind"] or ""
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    family = found["deit"] or ("clip" if kind.startswith("clip") else kind.rstrip("_") or "vit")
    tokens = {"class_token": "cls_token" in shapes, "distillation_token": "dist_token" in shapes}
    positioned = family != "deit3"
    rows = shapes["pos_embed"][1] - (sum(tokens.values()) if positioned else 0)
    pool = {"avg": "mean", "map": "attention", "": "none"}.get(given.get("global_pool", "token"), "token")
    if pool == "token" and tokens["distillation_token"]:
        pool = "distilled"
    activation = "quick_gelu" if "quickgelu" in architecture else "gelu"
    return VisionTransformerConfig(
        family=family,
        image_size=_timm_image_size(fields, rows, patch),
        patch_size=patch,
        width=width,
        num_layers=sum(name.endswith(".attn.qkv.weight") for name in shapes),
        num_heads=given.get("num_heads") or (16 if width in _WIDE_HEADS else width // 64),
        mlp_size=shapes["blocks.0.mlp.fc1.weight"][0],
        num_classes=shapes["head.weight"][0] if "head.weight" in shapes else 0,
        channels=channels,
        norm_eps=1e-5 if family == "clip" else 1e-6,
        activation="gelu_tanh" if _TANH.match(architecture) else activation,
        fused_qkv=True,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        layer_scale=any(name in shapes for name in ("blocks.0.ls1.gamma", "blocks.0.gamma_1")),
        patch_bias="patch_embed.proj.bias" in shapes,
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


def config_to_hf(config: VisionTransformerConfig, dtype: str = "float32") -> dict[str, Any]:
    """Turns a config into the fields of a Hugging Face ``config.json``; labels are numbered.

    Args:
      config: The config.
      dtype: Name of the type of the weights.
    """
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
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
        fields["label2id"] = {f"LABEL_{i}": i for i in range(config.num_classes)}
    return {"architectures": [architecture], **fields}


def config_to_timm(config: VisionTransformerConfig) -> dict[str, Any]:
    """Turns a config into the fields of timm's ``config.json``; those of preprocessing are for the caller to add."""
    if config.family == "dinov2":
        raise ValueError("layout: DINOv2 is written in layout 'hf'; timm's has other equations than are known here")
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
        "architecture": config.architecture or _timm_architecture(config),
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


def _ratio(config: VisionTransformerConfig) -> int | float:
    # An integer where it is one: transformers 5 refuses 4.0.
    whole, rest = divmod(config.mlp_size, config.width)
    return config.mlp_size / config.width if rest else whole


def _timm_architecture(config: VisionTransformerConfig) -> str:
    if config.family in ("deit", "deit3"):
        return f"{config.family}_base_{'distilled_' if config.distillation_token else ''}patch16_224"
    if config.family == "siglip" and config.activation == "gelu_tanh":
        return "vit_so400m_patch16_siglip_256"
    kind = {"clip": "clip_", "siglip": "siglip_"}.get(config.family, "")
    return f"vit_base_patch16_{kind}{'quickgelu_' if config.activation == 'quick_gelu' else ''}224"


def _architecture(fields: Fields) -> str:
    return (fields.get("architectures") or [""])[0]


def _num_labels(fields: Fields) -> int:
    if fields.get("id2label"):
        return len(fields["id2label"])
    return fields.get("num_labels", 2)


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _square(name: str, size: int | list[int]) -> int:
    height, width = _pair(size)
    if height != width:
        raise ValueError(f"{name}: expected a square, got {size}")
    return height


def _timm_image_size(fields: Fields, rows: int, patch: int) -> tuple[int, int]:
    """A square where the number of positions is one, otherwise what the fields say."""
    side = math.isqrt(max(rows, 0))
    if side * side == rows and side:
        return side * patch, side * patch
    named = (fields.get("model_args") or {}).get("img_size") or (fields.get("pretrained_cfg") or {}).get("input_size")
    size = _pair(named)[-2:] if isinstance(named, int) else tuple(named or ())[-2:]
    if len(size) != 2 or (size[0] // patch) * (size[1] // patch) != rows:
        raise ValueError(f"pos_embed: {rows} positions are no square, and config.json names no image size that fits")
    return size
