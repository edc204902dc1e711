"""Residual networks in the files of Hugging Face transformers and of timm (whose names are torchvision's too).

The arrays lie at ``("params", ...)`` and ``("batch_stats", ...)``: a file holds both trees of
:func:`subspace_jax.nn.resnet_init`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from subspace_jax.interop.names import Place
from subspace_jax.interop.vision_tensors import VisionTensor
from subspace_jax.nn import ResNetConfig, resnet_specs

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


def config_from_hf(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> ResNetConfig:
    """Turns the fields of a Hugging Face ``config.json`` into a config.

    Args:
      fields: The fields; absent ones have transformers' defaults.
      shapes: Shape of every tensor of the checkpoint, where known: without a classifier the config has no classes.

    Raises:
      ValueError: The model is not a ResNet, or its activation is not ReLU.
    """
    if fields.get("model_type") != "resnet":
        raise ValueError(f"model_type: expected 'resnet', got {fields.get('model_type')!r}")
    if fields.get("hidden_act", "relu") != "relu":
        raise ValueError(f"hidden_act: expected 'relu' for a ResNet, got {fields['hidden_act']!r}")
    kind = fields.get("layer_type", "bottleneck")
    if kind not in ("bottleneck", "basic"):
        raise ValueError(f"layer_type: expected 'bottleneck' or 'basic', got {kind!r}")
    return ResNetConfig(
        depths=tuple(fields.get("depths", (3, 4, 6, 3))),
        widths=tuple(fields.get("hidden_sizes", (256, 512, 1024, 2048))),
        block=kind,
        stem=(fields.get("embedding_size", 64),),
        stride_first=kind == "bottleneck" and bool(fields.get("downsample_in_bottleneck", False)),
        first_strides=2 if fields.get("downsample_in_first_stage", False) else 1,
        num_classes=0 if shapes is not None and "classifier.1.weight" not in shapes else num_labels(fields),
        in_channels=fields.get("num_channels", 3),
        family="hf",
    )


def num_labels(fields: Mapping[str, Any]) -> int:
    """Classes of a Hugging Face model: as many as ``id2label`` names, else ``num_labels``, else 2."""
    labels = fields.get("id2label")
    return len(labels) if labels is not None else fields.get("num_labels", 2)


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
    arguments = {**(fields.get("model_args") or {}), **{k: fields[k] for k in ("global_pool",) if k in fields}}
    if unknown := sorted(arguments.keys() - _HARMLESS):
        raise ValueError(f"model_args: {unknown} may change what the model computes, and are not supported")
    if arguments.get("global_pool", "avg") != "avg":
        raise ValueError(f"global_pool: expected 'avg', got {arguments['global_pool']!r}")
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
    inner = tuple(shapes[f"layer{s}.0.conv2.weight"][0] for s in stages)
    return ResNetConfig(
        depths=tuple(blocks[s] for s in stages),
        widths=tuple(shapes[f"layer{s}.0.{last}.weight"][0] for s in stages),
        inner_widths=inner,
        block="bottleneck" if bottleneck else "basic",
        stem=tuple(shapes[key][0] for key in stem),
        average_shortcut=any(len(shapes.get(f"layer{s}.0.downsample.1.weight", ())) == 4 for s in stages),
        groups=inner[0] // shapes["layer1.0.conv2.weight"][1],
        num_classes=shapes["fc.weight"][0] if "fc.weight" in shapes else 0,
        in_channels=shapes[stem[0]][1],
        family="timm",
    )


def tensor_names(config: ResNetConfig, layout: str | None = None) -> list[VisionTensor]:
    """Lists every tensor of a checkpoint, with its place here.

    Args:
      config: The network.
      layout: "hf" or "timm"; the family of the config by default.

    Raises:
      ValueError: The layout is unknown, or Hugging Face has no name for a deep stem, groups, shortcuts that average or
        free inner widths.
    """
    layout = _check_layout(config, layout)
    specs = dict(zip(("params", "batch_stats"), resnet_specs(config), strict=True))
    tensors: list[VisionTensor] = []
    for path, conv, norm in _layers(config, layout):
        tensors.append(_tensor(specs, f"{conv}.weight", ("params", *path, "conv", "kernel"), "conv"))
        for suffix, tree, leaf in (
            ("weight", "params", "scale"),
            ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"),
            ("running_var", "batch_stats", "var"),
        ):
            tensors.append(_tensor(specs, f"{norm}.{suffix}", (tree, *path, "norm", leaf)))
    if config.num_classes:
        head = "classifier.1" if layout == "hf" else "fc"
        tensors.append(_tensor(specs, f"{head}.weight", ("params", "head", "kernel"), "linear"))
        tensors.append(_tensor(specs, f"{head}.bias", ("params", "head", "bias")))
    return tensors


def counter_names(config: ResNetConfig, layout: str | None = None) -> list[str]:
    """Lists the int64 scalars that count training steps; nothing reads them, but the libraries store them."""
    return [f"{norm}.num_batches_tracked" for _, _, norm in _layers(config, _check_layout(config, layout))]


def canonical_names(names: Iterable[str], layout: str) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_names`, and leaves out the counters.

    A bare Hugging Face model is stored without the prefix ``resnet.``.

    Args:
      names: The names in the file.
      layout: "hf" or "timm".
    """
    names = [name for name in names if not name.endswith(".num_batches_tracked")]
    if layout == "hf" and not any(name.startswith("resnet.") for name in names):
        return {name: name if name.startswith("classifier.") else f"resnet.{name}" for name in names}
    return {name: name for name in names}


def _check_layout(config: ResNetConfig, layout: str | None) -> str:
    layout = config.family if layout is None else layout
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
    return layout


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


def _tensor(specs: Mapping, name: str, path: tuple[str, ...], kind: str = "same") -> VisionTensor:
    spec = specs
    for key in path:
        spec = spec[key]
    shape = spec.shape
    if kind == "conv":
        shape = (shape[3], shape[2], *shape[:2])
    return VisionTensor(name, shape[::-1] if kind == "linear" else shape, (Place(path),), kind)
