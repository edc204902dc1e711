"""Residual networks in the files of Hugging Face transformers.

A file holds both trees of :func:`subspace_jax.nn.init_params`, here the branches ``params`` and ``batch_stats`` of one.
The step counters beside the running statistics are ignored and not written, as no output depends on them.
"""

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
    word,
)
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.vision_tensors import resnet_layout
from subspace_jax.nn.models.resnet.config import ResNetConfig


def config_from_fields(fields: Fields, shapes: Shapes | None = None) -> ResNetConfig:
    """Converts the fields of ``config.json`` to a config.

    Args:
      fields: The fields; absent ones have the defaults of transformers.
      shapes: Shape of every tensor; files without a classifier have no classes.

    Raises:
      ValueError: The model is not a ResNet, or its activation is not ReLU.
    """
    word(fields, "model_type", None, ("resnet",))
    word(fields, "hidden_act", "relu", ("relu",))
    kind = word(fields, "layer_type", "bottleneck", ("bottleneck", "basic"))
    stride_first = flag(fields, "downsample_in_bottleneck", False)
    bare = shapes is not None and "classifier.1.weight" not in shapes
    return ResNetConfig(
        depths=integers(fields, "depths", (3, 4, 6, 3), most=MAX_LAYERS),
        widths=integers(fields, "hidden_sizes", (256, 512, 1024, 2048)),
        block=kind,
        stem=(integer(fields, "embedding_size", 64),),
        stride_first=kind == "bottleneck" and stride_first,
        first_strides=2 if flag(fields, "downsample_in_first_stage", False) else 1,
        num_classes=0 if bare else num_labels(fields),
        channels=integer(fields, "num_channels", 3),
        convention="hf",
    )


def fields_from_config(config: ResNetConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``; classes are numbered."""
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
        **label_fields(config.num_classes),
    }


def convert(config: ResNetConfig, params: PyTree) -> tuple[ResNetConfig, PyTree]:
    """Sets the convention, which decides which output of the stem is hidden state 0."""
    return config.replace(convention="hf"), params


def tensor_layout(config: ResNetConfig) -> TensorLayout:
    """Returns the parameters with the tensors of a checkpoint.

    Raises:
      ValueError: Hugging Face has no name for a deep stem, groups, shortcuts that average, or free inner widths.
    """
    bottleneck = config.block == "bottleneck"
    plain = tuple(width // (4 if bottleneck else 1) for width in config.widths) == config.inner_widths
    if not (plain and len(config.stem) == 1 and config.groups == 1 and not config.average_shortcut):
        raise ValueError(
            "layout: 'hf' can't express a deep stem, groups, shortcuts that average, or inner widths that are not a "
            f"quarter; expected 'timm' for {config}"
        )
    layers = [(("stem", "layer0"), *_pair("resnet.embedder.embedder"))]
    for block in config.blocks():
        stage, index = block.name[0].removeprefix("stage"), block.name[1].removeprefix("block")
        root = f"resnet.encoder.stages.{stage}.layers.{index}"
        for i in range(3 if bottleneck else 2):
            layers.append(((*block.name, f"layer{i}"), *_pair(f"{root}.layer.{i}")))
        if block.projects:
            layers.append(((*block.name, "shortcut"), *_pair(f"{root}.shortcut")))
    return resnet_layout(config, layers, "classifier.1")


def canonical_names(config: ResNetConfig, names: Iterable[str]) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_layout`; a bare model is stored without ``resnet.``."""
    del config
    names = [name for name in names if not name.endswith(".num_batches_tracked")]
    return {name: name if name.startswith(("resnet.", "classifier.")) else f"resnet.{name}" for name in names}


def _pair(root: str) -> tuple[str, str]:
    return f"{root}.convolution", f"{root}.normalization"
