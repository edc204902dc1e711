"""Residual networks in the files of timm, whose names are those of torchvision."""

import re
from collections.abc import Iterable
from typing import Any

from subspace_jax.interop.config_fields import Fields, Shapes, check_timm_sizes, dims, group, shown, word
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.vision_tensors import resnet_layout
from subspace_jax.nn.models.resnet.config import ResNetConfig

# Names whose forward pass is that of ResNetConfig; many others (resnetaa50, resnetblur50, resnet50_gn, resnetv2_50,
# resnet33ts) have the same tensors or nearly so, and compute something else.
_ARCHITECTURE = re.compile(r"resnet\d+[cdst]?|resnext\d+d?_\d+x\d+d|wide_resnet\d+_\d+|tv_resnet\d+")
# What model_args may hold: sizes that the tensors show, and what changes no forward pass in evaluation.
_HARMLESS = {
    "channels",
    "layers",
    "stem_width",
    "stem_type",
    "num_classes",
    "in_chans",
    "global_pool",
    "cardinality",
    "base_width",
    "avg_down",
    "drop_rate",
    "drop_path_rate",
    "zero_init_last",
    "pretrained",
}


def config_from_fields(fields: Fields, shapes: Shapes) -> ResNetConfig:
    """Converts ``config.json`` to a config; the sizes come from the tensors.

    Args:
      fields: The fields.
      shapes: Shape of every tensor.

    Raises:
      ValueError: The architecture is not one of plain ResNet, ResNet-D or ResNeXt, ``model_args`` changes the forward
        pass, or the tensors are not those of such a network.
    """
    name = str(fields.get("architecture"))
    if not _ARCHITECTURE.fullmatch(name):
        raise ValueError(
            f"architecture: {name!r} is not supported; expected names such as 'resnet50', 'resnet101d' or "
            "'resnext50_32x4d'"
        )
    arguments = group(fields, "model_args")
    if unknown := sorted(arguments.keys() - _HARMLESS):
        raise ValueError(f"model_args: {shown(unknown)} may change what the model computes, and are not supported")
    for named in (fields, arguments):
        word(named, "global_pool", "avg", ("avg",))
    blocks: dict[int, int] = {}
    for key in shapes:
        if found := re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", key):
            stage, index = (int(n) for n in found.groups())
            blocks[stage] = max(blocks.get(stage, 0), index + 1)
    stages = range(1, len(blocks) + 1)
    stem = ("conv1.weight",) if "conv1.weight" in shapes else ("conv1.0.weight", "conv1.3.weight", "conv1.6.weight")
    bottleneck = "layer1.0.conv3.weight" in shapes
    last = "conv3" if bottleneck else "conv2"
    needed = [*stem, *(f"layer{s}.0.{conv}.weight" for s in stages for conv in ("conv2", last))]
    if sorted(blocks) != list(stages) or not blocks or any(key not in shapes for key in needed):
        raise ValueError(
            f"architecture {name!r}: the tensors are not those of a ResNet; expected {needed[:4]} and more"
        )
    inner = tuple(dims(shapes, f"layer{s}.0.conv2.weight", 4)[0] for s in stages)
    config = ResNetConfig(
        depths=tuple(blocks[s] for s in stages),
        widths=tuple(dims(shapes, f"layer{s}.0.{last}.weight", 4)[0] for s in stages),
        inner_widths=inner,
        block="bottleneck" if bottleneck else "basic",
        stem=tuple(dims(shapes, key, 4)[0] for key in stem),
        average_shortcut=any(len(shapes.get(f"layer{s}.0.downsample.1.weight", ())) == 4 for s in stages),
        groups=inner[0] // shapes["layer1.0.conv2.weight"][1],
        num_classes=dims(shapes, "fc.weight", 2)[0] if "fc.weight" in shapes else 0,
        channels=shapes[stem[0]][1],
        convention="timm",
        architecture=name,
    )
    planes = tuple(width // (4 if bottleneck else 1) for width in config.widths)
    check_timm_sizes(
        fields,
        layers=config.depths,
        channels=planes,
        cardinality=config.groups,
        base_width=64 * inner[0] // planes[0] // config.groups if planes[0] else 0,
        num_classes=config.num_classes,
        in_chans=config.channels,
        **({"stem_width": config.stem[1], "avg_down": config.average_shortcut} if len(stem) == 3 else {}),
    )
    return config


def fields_from_config(config: ResNetConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``, without those of preprocessing.

    Raises:
      ValueError: timm has no network with such a stem or another number of stages than four.
    """
    del dtype
    deep = len(config.stem) == 3
    stem = config.stem[2] == 2 * config.stem[1] if deep else config.stem == (64,)
    if len(config.depths) != 4 or not stem:
        raise ValueError(
            f"layout: 'timm' has four stages, and a stem of (64,) or (s, s, 2 s) channels; got {len(config.depths)} "
            f"stages and {config.stem}"
        )
    expansion = 4 if config.block == "bottleneck" else 1
    planes = [width // expansion for width in config.widths]
    arguments = {
        "layers": list(config.depths),
        "channels": planes,
        "cardinality": config.groups,
        "base_width": 64 * config.inner_widths[0] // planes[0] // config.groups,
        "num_classes": config.num_classes,
        "in_chans": config.channels,
        "global_pool": "avg",
    }
    if deep:
        arguments["stem_type"] = "deep" if config.stem[0] == config.stem[1] else "deep_tiered"
        arguments["stem_width"] = config.stem[1]
    if config.average_shortcut:
        arguments["avg_down"] = True
    name = config.architecture or f"resnet{18 if config.block == 'basic' else 50}{'d' if deep else ''}"
    return {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.out_features,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.channels, 224, 224],
            "fixed_input_size": False,
            "num_classes": config.num_classes,
            "first_conv": "conv1.0" if deep else "conv1",
            "classifier": "fc",
        },
    }


def convert(config: ResNetConfig, params: PyTree) -> tuple[ResNetConfig, PyTree]:
    """Sets the convention, which decides which output of the stem is hidden state 0."""
    return config.replace(convention="timm"), params


def tensor_layout(config: ResNetConfig) -> TensorLayout:
    """Returns the parameters with the tensors of a checkpoint.

    Raises:
      ValueError: timm has no network with a stride in the first stage or in 1x1 convolutions.
    """
    if config.stride_first or config.first_strides != 1:
        raise ValueError(
            f"layout: 'timm' has the stride in the 3x3 convolutions and none in the first stage; got {config}"
        )
    last = len(config.stem) - 1
    layers = [(("stem", f"layer{i}"), f"conv1.{3 * i}", f"conv1.{3 * i + 1}") for i in range(last)]
    layers.append((("stem", f"layer{last}"), f"conv1.{3 * last}" if last else "conv1", "bn1"))
    first = 1 if config.average_shortcut else 0
    for block in config.blocks():
        stage, index = block.name[0].removeprefix("stage"), block.name[1].removeprefix("block")
        root = f"layer{int(stage) + 1}.{index}"
        for i in range(3 if config.block == "bottleneck" else 2):
            layers.append(((*block.name, f"layer{i}"), f"{root}.conv{i + 1}", f"{root}.bn{i + 1}"))
        if block.projects:
            shortcut = f"{root}.downsample"
            layers.append(((*block.name, "shortcut"), f"{shortcut}.{first}", f"{shortcut}.{first + 1}"))
    return resnet_layout(config, layers, "fc")


def canonical_names(config: ResNetConfig, names: Iterable[str]) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_layout`: the same, without step counters."""
    del config
    return {name: name for name in names if not name.endswith(".num_batches_tracked")}
