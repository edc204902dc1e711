"""Swin transformers in the files of Hugging Face transformers."""

import re
from collections.abc import Iterable
from typing import Any

from subspace_jax.interop.config_fields import (
    MAX_LAYERS,
    Fields,
    Shapes,
    flag,
    integer,
    integers,
    label_fields,
    num_labels,
    number,
    pair,
    square,
    word,
)
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.vision_tensors import swin_layout
from subspace_jax.nn.models.swin.config import SwinConfig

_FROM_HF_ACTIVATION = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Module of a block to its name in files, and in memory since transformers 5.
_BLOCK = {
    "norm1": ("layernorm_before", "layernorm_before"),
    "attn/q": ("attention.self.query", "attention.q_proj"),
    "attn/k": ("attention.self.key", "attention.k_proj"),
    "attn/v": ("attention.self.value", "attention.v_proj"),
    "attn/relative_bias": ("attention.self", "attention.relative_position_bias"),
    "attn/out": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "mlp/up": ("intermediate.dense", "mlp.fc1"),
    "mlp/down": ("output.dense", "mlp.fc2"),
}
_TOP = {
    "patch_embed": "swin.embeddings.patch_embeddings.projection",
    "embed_norm": "swin.embeddings.norm",
    "position": "swin.embeddings",
    "norm": "swin.layernorm",
    "head": "classifier",
}


def config_from_fields(fields: Fields, shapes: Shapes | None = None) -> SwinConfig:
    """Converts the fields of ``config.json`` to a config.

    The drop path rate of the file's training is ignored; ``config.replace`` sets another.

    Args:
      fields: The fields; absent ones have the defaults of transformers.
      shapes: Shape of every tensor; files without a classifier have no classes.

    Raises:
      ValueError: The model is not a Swin transformer of the first version, or its activation is not supported.
    """
    word(fields, "model_type", None, ("swin",))
    bare = shapes is not None and "classifier.weight" not in shapes
    return SwinConfig(
        image_size=pair(fields, "image_size", 224),
        patch_size=square(fields, "patch_size", 4),
        embed_dim=integer(fields, "embed_dim", 96),
        depths=integers(fields, "depths", (2, 2, 6, 2), most=MAX_LAYERS),
        num_heads=integers(fields, "num_heads", (3, 6, 12, 24)),
        window=square(fields, "window_size", 7),
        mlp_ratio=number(fields, "mlp_ratio", 4.0, most=1e6),
        norm_eps=number(fields, "layer_norm_eps", 1e-5, least=0, most=1),
        activation=_FROM_HF_ACTIVATION[word(fields, "hidden_act", "gelu", _FROM_HF_ACTIVATION)],
        qkv_bias=flag(fields, "qkv_bias", True),
        absolute_positions=flag(fields, "use_absolute_embeddings", False),
        num_classes=0 if bare else num_labels(fields),
        channels=integer(fields, "num_channels", 3),
        convention="hf",
    )


def fields_from_config(config: SwinConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``; classes are numbered."""
    stages, size = [f"stage{i + 1}" for i in range(len(config.depths))], config.image_size
    activation = next(theirs for theirs, ours in _FROM_HF_ACTIVATION.items() if ours == config.activation)
    return {
        "architectures": ["SwinForImageClassification" if config.num_classes else "SwinModel"],
        "model_type": "swin",
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "embed_dim": config.embed_dim,
        "hidden_size": config.out_features,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "hidden_act": activation,
        "use_absolute_embeddings": config.absolute_positions,
        "layer_norm_eps": config.norm_eps,
        "stage_names": ["stem", *stages],
        "out_features": stages[-1:],
        "out_indices": [len(stages)],
        **label_fields(config.num_classes),
    }


def convert(config: SwinConfig, params: PyTree) -> tuple[SwinConfig, PyTree]:
    """Sets the convention, which decides where hidden states are taken, and how other image sizes are treated."""
    return config.replace(convention="hf"), params


def tensor_layout(config: SwinConfig, version: str = "v4") -> TensorLayout:
    """Returns the parameters with the tensors of a checkpoint.

    Args:
      config: The model.
      version: "v4" for the names in files, "v5" for those in the memory of transformers 5, which PEFT uses.
    """
    block = {path: names[version == "v5"] for path, names in _BLOCK.items()}

    def roots(stage: int) -> tuple[str, str]:
        root = f"swin.encoder.layers.{stage}"
        return root, f"{root}.downsample"

    return swin_layout(config, _TOP, block, roots)


def canonical_names(config: SwinConfig, names: Iterable[str]) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_layout`, without indices and masks.

    The names of transformers 4 and 5 are read, with and without the prefix ``swin.``.
    """
    del config
    names = [name for name in names if not name.endswith((".relative_position_index", ".attn_mask"))]
    bare = not any(name.startswith("swin.") for name in names)
    prefixed = {name: f"swin.{name}" if bare and not name.startswith("classifier.") else name for name in names}
    return {name: _old_name(full) for name, full in prefixed.items()}


def _old_name(name: str) -> str:
    found = re.fullmatch(r"(swin\.encoder\.layers\.\d+\.blocks\.\d+)\.(.+)\.([^.]+)", name)
    if not found:
        return name
    old = {new: old for old, new in _BLOCK.values()}
    return f"{found[1]}.{old.get(found[2], found[2])}.{found[3]}"
