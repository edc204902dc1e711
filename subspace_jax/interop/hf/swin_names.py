"""Swin transformers in the files of Hugging Face transformers and of timm."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from subspace_jax.interop.hf.config_fields import (
    MAX_LAYERS,
    check_timm_sizes,
    dims,
    flag,
    group,
    integer,
    integers,
    num_labels,
    number,
    pair,
    shown,
    square,
    timm_image_size,
    word,
)
from subspace_jax.interop.hf.names import Place, TensorName
from subspace_jax.interop.hf.resnet_names import labels
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.swin.model import swin_specs as specs
from subspace_jax.nn.params import ParamSpec

PyTree = Any

LAYOUTS = ("hf", "hf_v5", "timm")

_FROM_HF_ACTIVATION = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Module of a block here, and there: in the files of transformers, in its memory since version 5, and in timm's files.
_BLOCK = {
    "norm1": ("layernorm_before", "layernorm_before", "norm1"),
    "attn/q": ("attention.self.query", "attention.q_proj", "attn.qkv"),
    "attn/k": ("attention.self.key", "attention.k_proj", "attn.qkv"),
    "attn/v": ("attention.self.value", "attention.v_proj", "attn.qkv"),
    "attn/relative_bias": ("attention.self", "attention.relative_position_bias", "attn"),
    "attn/out": ("attention.output.dense", "attention.o_proj", "attn.proj"),
    "norm2": ("layernorm_after", "layernorm_after", "norm2"),
    "mlp/up": ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    "mlp/down": ("output.dense", "mlp.fc2", "mlp.fc2"),
}
_TOP = {
    "patch_embed": ("swin.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    "embed_norm": ("swin.embeddings.norm", "patch_embed.norm"),
    "norm": ("swin.layernorm", "norm"),
    "head": ("classifier", "head.fc"),
}
_TIMM_HARMLESS = {
    "img_size",
    "patch_size",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "qkv_bias",
    "mlp_ratio",
    "num_classes",
    "in_chans",
    "global_pool",
    "drop_rate",
    "drop_path_rate",
    "pretrained",
}


def config_from_hf(fields: Mapping[str, Any]) -> SwinConfig:
    """Turns the fields of a Hugging Face ``config.json`` into a config.

    The drop path rate of the file is that of its training, and is left out; ``config.replace`` sets another.

    Args:
      fields: The fields; absent ones have transformers' defaults.

    Raises:
      ValueError: The model is not a Swin transformer of the first version, or its activation is not supported.
    """
    word(fields, "model_type", None, ("swin",))
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
        num_classes=num_labels(fields),
        channels=integer(fields, "num_channels", 3),
        convention="hf",
    )


def complete(config: SwinConfig, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> SwinConfig:
    """Takes the classes away from a config of Hugging Face whose files have no classifier."""
    del fields
    bare = config.convention == "hf" and "classifier.weight" not in shapes
    return config.replace(num_classes=0) if bare else config


def config_to_hf(config: SwinConfig, dtype: str = "float32") -> dict[str, Any]:
    """Turns a config into the fields of a Hugging Face ``config.json``; labels are numbered.

    Args:
      config: The config.
      dtype: Name of the type of the weights.
    """
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
        **labels(config.num_classes),
    }


def config_from_timm(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> SwinConfig:
    """Reads sizes off the tensors of a timm checkpoint, or of one of the authors' own files.

    Args:
      fields: The fields of its ``config.json``.
      shapes: Shape of every tensor.

    Raises:
      ValueError: The architecture is another one, ``model_args`` changes the forward pass, or the tensors are not those
        of a Swin transformer.
    """
    name = str(fields.get("architecture"))
    if not re.fullmatch(r"swin_(tiny|small|base|large)_patch\d+_window\d+_\d+", name):
        raise ValueError(
            f"architecture: {name!r} is not supported; expected a name such as 'swin_tiny_patch4_window7_224'"
        )
    arguments = group(fields, "model_args")
    if unknown := sorted(arguments.keys() - _TIMM_HARMLESS):
        raise ValueError(f"model_args: {shown(unknown)} may change what the model computes, and are not supported")
    for named in (fields, arguments):
        word(named, "global_pool", "avg", ("avg",))
    depths: dict[int, int] = {}
    for key in shapes:
        if found := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", key):
            stage, index = (int(n) for n in found.groups())
            depths[stage] = max(depths.get(stage, 0), index + 1)
    needed = ["patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight"]
    if not depths or sorted(depths) != list(range(len(depths))) or any(key not in shapes for key in needed):
        raise ValueError(f"architecture {name!r}: the tensors are not those of a Swin transformer; expected {needed}")
    first = [f"layers.{stage}.blocks.0.attn.relative_position_bias_table" for stage in range(len(depths))]
    if missing := [name for name in first if name not in shapes]:
        raise ValueError(f"architecture {name!r}: the tensors {missing} are missing")
    tables = [dims(shapes, name, 2) for name in first]
    width, channels, patch, _ = dims(shapes, "patch_embed.proj.weight", 4)
    heads = [key for key in ("head.fc.weight", "head.weight") if key in shapes]
    config = SwinConfig(
        image_size=timm_image_size(fields) or (224, 224),
        patch_size=patch,
        embed_dim=width,
        depths=tuple(depths[stage] for stage in range(len(depths))),
        num_heads=tuple(table[1] for table in tables),
        window=(math.isqrt(tables[0][0]) + 1) // 2,
        mlp_ratio=dims(shapes, "layers.0.blocks.0.mlp.fc1.weight", 2)[0] / width,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in shapes,
        num_classes=dims(shapes, heads[0], 2)[0] if heads else 0,
        channels=channels,
        convention="timm",
        architecture=name,
    )
    check_timm_sizes(
        fields,
        (round(config.mlp_ratio * width), width),
        patch_size=patch,
        embed_dim=width,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window,
        qkv_bias=config.qkv_bias,
        num_classes=config.num_classes,
        in_chans=channels,
    )
    return config


def config_to_timm(config: SwinConfig) -> dict[str, Any]:
    """Turns a config into the fields of timm's ``config.json``; those of preprocessing are for the caller to add."""
    arguments = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "num_classes": config.num_classes,
        "in_chans": config.channels,
        "global_pool": "avg",
    }
    return {
        "architecture": config.architecture or "swin_tiny_patch4_window7_224",
        "num_classes": config.num_classes,
        "num_features": config.out_features,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, *config.image_size],
            "fixed_input_size": True,
            "num_classes": config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }


def converted(config: SwinConfig, params: PyTree, layout: str) -> tuple[SwinConfig, PyTree]:
    """Changes what a layout alone decides: where hidden states are taken, and how other sizes are treated."""
    return config.replace(convention=layout), params


def tensor_names(config: SwinConfig, layout: str = "hf") -> list[TensorName]:
    """Lists every tensor of a checkpoint, with its place here.

    Args:
      config: The model.
      layout: "hf", "timm", or "hf_v5" for the names that transformers 5 has in memory, which PEFT's adapters use.

    Raises:
      ValueError: The layout is unknown, or timm has no name for absolute positions.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if layout == "timm" and config.absolute_positions:
        raise ValueError("layout: 'timm' can't express absolute positions")
    tree, timm, tensors = specs(config), layout == "timm", []

    def module(name: str, path: str, part: tuple[int, int] = (0, 1)) -> None:
        """Adds the tensors of the module at ``path``."""
        branch, keys = tree, tuple(path.split("/"))
        for key in keys:
            branch = branch[key]
        for leaf, spec in branch.items():
            tensors.append(_tensor(config, name, (*keys, leaf), spec, part))

    top = {path: names[timm] for path, names in _TOP.items()}
    module(top["patch_embed"], "patch_embed")
    module(top["embed_norm"], "embed_norm")
    if config.absolute_positions:
        module("swin.embeddings", "position")
    for stage, depth in enumerate(config.depths):
        root = f"layers.{stage}" if timm else f"swin.encoder.layers.{stage}"
        for block in range(depth):
            for path, names in _BLOCK.items():
                name = names[LAYOUTS.index(layout)]
                part = ("qkv".index(path[-1]), 3) if name == "attn.qkv" else (0, 1)
                module(f"{root}.blocks.{block}.{name}", f"stage{stage}/block{block}/{path}", part)
        if stage + 1 < len(config.depths):
            merge = (f"layers.{stage + 1}" if timm else root) + ".downsample"
            module(f"{merge}.norm", f"stage{stage}/merge/norm")
            module(f"{merge}.reduction", f"stage{stage}/merge/reduction")
    module(top["norm"], "norm")
    if config.num_classes:
        module(top["head"], "head")
    return tensors


def _tensor(
    config: SwinConfig, module: str, path: tuple[str, ...], spec: ParamSpec, part: tuple[int, int]
) -> TensorName:
    leaf, place = path[-1], Place(path)
    if leaf == "embedding":
        shape = (1, *spec.shape)
        return TensorName(f"{module}.position_embeddings", place, False, order=(0, 1, 2), shape=shape)
    if leaf == "table":
        return TensorName(f"{module}.relative_position_bias_table", place, False)
    if path == ("patch_embed", "kernel"):
        shape = (spec.shape[1], config.channels, config.patch_size, config.patch_size)
        return TensorName(f"{module}.weight", place, False, order=(2, 3, 1, 0), shape=shape)
    suffix = "bias" if leaf == "bias" else "weight"
    return TensorName(f"{module}.{suffix}", place, leaf == "kernel", part=part)


def canonical_names(config: SwinConfig, names: Iterable[str], layout: str) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_names`, and leaves out indices and masks.

    Of Hugging Face, both spellings are read, with and without the prefix ``swin.``; of timm, also the authors' own
    files, which count the mergings from 0 and call the head ``head``.

    Args:
      config: The model.
      names: The names in the file.
      layout: "hf" or "timm".
    """
    del config
    names = [name for name in names if not name.endswith((".relative_position_index", ".attn_mask"))]
    if layout == "timm":
        authors = "layers.0.downsample.reduction.weight" in names
        return {name: _from_authors(name) if authors else name for name in names}
    bare = not any(name.startswith("swin.") for name in names)
    prefixed = {name: f"swin.{name}" if bare and not name.startswith("classifier.") else name for name in names}
    return {name: _old_spelling(full) for name, full in prefixed.items()}


def _from_authors(name: str) -> str:
    name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
    return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)


def _old_spelling(name: str) -> str:
    found = re.fullmatch(r"(swin\.encoder\.layers\.\d+\.blocks\.\d+)\.(.+)\.([^.]+)", name)
    if not found:
        return name
    old = {names[1]: names[0] for names in _BLOCK.values()}
    return f"{found[1]}.{old.get(found[2], found[2])}.{found[3]}"
