"""Swin transformers in the files of timm, and in those of the authors."""

import math
import re
from collections.abc import Iterable
from typing import Any

from subspace_jax.interop.config_fields import (
    Fields,
    Shapes,
    check_timm_sizes,
    dims,
    group,
    shown,
    timm_image_size,
    word,
)
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.vision_tensors import swin_layout
from subspace_jax.nn.models.swin.config import SwinConfig

_BLOCK = {
    "norm1": "norm1",
    "attn/q": "attn.qkv",
    "attn/k": "attn.qkv",
    "attn/v": "attn.qkv",
    "attn/relative_bias": "attn",
    "attn/out": "attn.proj",
    "norm2": "norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
_TOP = {"patch_embed": "patch_embed.proj", "embed_norm": "patch_embed.norm", "norm": "norm", "head": "head.fc"}
# What model_args may hold: sizes that the tensors show, and what changes no forward pass in evaluation.
_HARMLESS = {
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


def config_from_fields(fields: Fields, shapes: Shapes) -> SwinConfig:
    """Converts ``config.json`` to a config; the sizes come from the tensors, of timm or of the authors.

    Args:
      fields: The fields.
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
    if unknown := sorted(arguments.keys() - _HARMLESS):
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


def fields_from_config(config: SwinConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``, without those of preprocessing."""
    del dtype
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


def convert(config: SwinConfig, params: PyTree) -> tuple[SwinConfig, PyTree]:
    """Sets the convention, which decides where hidden states are taken, and how other image sizes are treated."""
    return config.replace(convention="timm"), params


def tensor_layout(config: SwinConfig) -> TensorLayout:
    """Returns the parameters with the tensors of a checkpoint.

    Raises:
      ValueError: timm has no name for absolute positions.
    """
    if config.absolute_positions:
        raise ValueError("layout: 'timm' can't express absolute positions")
    return swin_layout(config, _TOP, _BLOCK, lambda stage: (f"layers.{stage}", f"layers.{stage + 1}.downsample"))


def canonical_names(config: SwinConfig, names: Iterable[str]) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_layout`, without indices and masks.

    The files of the authors count the patch mergings from 0 and call the head ``head``.
    """
    del config
    names = [name for name in names if not name.endswith((".relative_position_index", ".attn_mask"))]
    authors = "layers.0.downsample.reduction.weight" in names
    return {name: _from_authors(name) if authors else name for name in names}


def _from_authors(name: str) -> str:
    name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
    return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
