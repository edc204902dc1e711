"""Residual networks in the files of Hugging Face transformers and of timm (whose names are torchvision's too).

A file holds both trees of :func:`subspace_jax.nn.init_params`; here they are the branches ``params`` and
``batch_stats`` of one.  The counters of training steps that files carry beside the running statistics are passed over
and not written, for no output depends on them.
"""

import re
from collections.abc import Mapping
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
    shown,
    word,
)
from subspace_jax.interop.hf.names import Place, TensorName
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.resnet.model import resnet_specs

PyTree = Any

LAYOUTS = ("hf", "timm")

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


def specs(config: ResNetConfig) -> PyTree:
    """Describes parameters and running statistics: ``{"params": ..., "batch_stats": ...}``."""
    return dict(zip(("params", "batch_stats"), resnet_specs(config), strict=True))


def config_from_hf(fields: Mapping[str, Any]) -> ResNetConfig:
    """Turns the fields of a Hugging Face ``config.json`` into a config.

    Args:
      fields: The fields; absent ones have transformers' defaults.

    Raises:
      ValueError: The model is not a ResNet, or its activation is not ReLU.
    """
    word(fields, "model_type", None, ("resnet",))
    word(fields, "hidden_act", "relu", ("relu",))
    kind = word(fields, "layer_type", "bottleneck", ("bottleneck", "basic"))
    stride_first = flag(fields, "downsample_in_bottleneck", False)
    return ResNetConfig(
        depths=integers(fields, "depths", (3, 4, 6, 3), most=MAX_LAYERS),
        widths=integers(fields, "hidden_sizes", (256, 512, 1024, 2048)),
        block=kind,
        stem=(integer(fields, "embedding_size", 64),),
        stride_first=kind == "bottleneck" and stride_first,
        first_strides=2 if flag(fields, "downsample_in_first_stage", False) else 1,
        num_classes=num_labels(fields),
        channels=integer(fields, "num_channels", 3),
        convention="hf",
    )


def complete(config: ResNetConfig, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ResNetConfig:
    """Takes the classes away from a config of Hugging Face whose files have no classifier."""
    del fields
    bare = config.convention == "hf" and "classifier.1.weight" not in shapes
    return config.replace(num_classes=0) if bare else config


def config_to_hf(config: ResNetConfig, dtype: str = "float32") -> dict[str, Any]:
    """Turns a config into the fields of a Hugging Face ``config.json``; labels are numbered.

    Args:
      config: The config.
      dtype: Name of the type of the weights.
    """
    stages = [f"stage{i + 1}" for i in range(len(config.depths))]
    return {
        "architectures": ["ResNetForImageClassification" if config.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "dtype": dtype,
        "torch_dtype": dtype,
        "num_channels": config.channels,
        "embedding_size": config.stem[-1],
        "hidden_sizes": list(config.widths),
        "depths": list(config.depths),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": config.first_strides == 2,
        "downsample_in_bottleneck": config.stride_first,
        "stage_names": ["stem", *stages],
        "out_features": stages[-1:],
        "out_indices": [len(stages)],
        **labels(config.num_classes),
    }


def labels(count: int) -> dict[str, Any]:
    """The fields of a Hugging Face config that name classes, here by numbers."""
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}} if count else {}


def config_from_timm(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ResNetConfig:
    """Reads sizes off the tensors of a timm checkpoint.

    Args:
      fields: The fields of its ``config.json``.
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


def config_to_timm(config: ResNetConfig) -> dict[str, Any]:
    """Turns a config into the fields of timm's ``config.json``; those of preprocessing are for the caller to add.

    Raises:
      ValueError: timm has no network with such a stem or another number of stages than four.
    """
    deep = len(config.stem) == 3
    stem = config.stem[2] == 2 * config.stem[1] if deep else config.stem == (64,)
    if len(config.depths) != 4 or not stem:
        raise ValueError(
            f"layout: 'timm' has four stages, and a stem of (64,) or (s, s, 2 s) channels; got {len(config.depths)} "
            f"stages and {config.stem}"
        )
    share = 4 if config.block == "bottleneck" else 1
    planes = [width // share for width in config.widths]
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


def converted(config: ResNetConfig, params: PyTree, layout: str) -> tuple[ResNetConfig, PyTree]:
    """Changes what a layout alone decides, which of the stem's outputs is hidden state 0."""
    return config.replace(convention=layout), params


def tensor_names(config: ResNetConfig, layout: str = "hf") -> list[TensorName]:
    """Lists every tensor of a checkpoint, with its place here.

    Args:
      config: The network.
      layout: "hf" or "timm".

    Raises:
      ValueError: The layout is unknown, or can't express the network: Hugging Face has no name for a deep stem, groups,
        shortcuts that average or free inner widths, timm none for a first stage with stride.
    """
    _check_layout(config, layout)
    tensors: list[TensorName] = []
    for path, conv, norm in _layers(config, layout):
        kernel = Place(("params", *path, "conv", "kernel"))
        tensors.append(TensorName(f"{conv}.weight", kernel, False, order=(2, 3, 1, 0)))
        for suffix, tree, leaf in (
            ("weight", "params", "scale"),
            ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"),
            ("running_var", "batch_stats", "var"),
        ):
            tensors.append(TensorName(f"{norm}.{suffix}", Place((tree, *path, "norm", leaf)), False))
    if config.num_classes:
        head = "classifier.1" if layout == "hf" else "fc"
        tensors.append(TensorName(f"{head}.weight", Place(("params", "head", "kernel")), True))
        tensors.append(TensorName(f"{head}.bias", Place(("params", "head", "bias")), False))
    return tensors


def canonical_name(config: ResNetConfig, name: str, layout: str) -> str | None:
    """Returns the name of :func:`tensor_names` for one in a file, or None for a counter.

    A bare Hugging Face model is stored without the prefix ``resnet.``.
    """
    del config
    if name.endswith(".num_batches_tracked"):
        return None
    if layout == "hf" and not name.startswith(("resnet.", "classifier.")):
        return f"resnet.{name}"
    return name


def _check_layout(config: ResNetConfig, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    share = 4 if config.block == "bottleneck" else 1
    plain = tuple(width // share for width in config.widths) == config.inner_widths
    if layout == "hf" and not (plain and len(config.stem) == 1 and config.groups == 1 and not config.average_shortcut):
        raise ValueError(
            "layout: 'hf' can't express a deep stem, groups, shortcuts that average, or inner widths that are not a "
            f"quarter; expected 'timm' for {config}"
        )
    if layout == "timm" and (config.stride_first or config.first_strides != 1):
        raise ValueError(
            f"layout: 'timm' has the stride in the 3x3 convolutions and none in the first stage; got {config}"
        )


def _layers(config: ResNetConfig, layout: str) -> list[tuple[tuple[str, ...], str, str]]:
    """Path here, and names of convolution and normalisation there, of every pair of them."""
    count = len(config.stem)
    if layout == "hf":
        layers = [(("stem", "layer0"), *_pair("resnet.embedder.embedder"))]
    elif count == 1:
        layers = [(("stem", "layer0"), "conv1", "bn1")]
    else:
        layers = [(("stem", f"layer{i}"), f"conv1.{3 * i}", f"conv1.{3 * i + 1}") for i in range(count - 1)]
        layers.append((("stem", f"layer{count - 1}"), f"conv1.{3 * (count - 1)}", "bn1"))
    inside = 2 if config.block == "basic" else 3
    for block in config.blocks():
        stage, index = (int(re.sub(r"\D", "", part)) for part in block.name)
        if layout == "hf":
            root = f"resnet.encoder.stages.{stage}.layers.{index}"
            pairs = [_pair(f"{root}.layer.{i}") for i in range(inside)]
            shortcut = _pair(f"{root}.shortcut")
        else:
            root, first = f"layer{stage + 1}.{index}", 1 if config.average_shortcut else 0
            pairs = [(f"{root}.conv{i + 1}", f"{root}.bn{i + 1}") for i in range(inside)]
            shortcut = (f"{root}.downsample.{first}", f"{root}.downsample.{first + 1}")
        layers += [((*block.name, f"layer{i}"), *pair) for i, pair in enumerate(pairs)]
        if block.projects:
            layers.append(((*block.name, "shortcut"), *shortcut))
    return layers


def _pair(root: str) -> tuple[str, str]:
    return f"{root}.convolution", f"{root}.normalization"
