"""Tensors of vision models that checkpoints of Hugging Face and timm lay out alike, under different names."""

from collections.abc import Callable, Iterable
from typing import Any

from subspace_jax.interop.tensors import Path, Place, PyTree, TensorLayout, TensorName, at
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.resnet.model import resnet_specs
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.swin.model import swin_specs
from subspace_jax.nn.models.vit.config import VisionTransformerConfig

_OUT_IN_WINDOW = (2, 3, 1, 0)


def table_tensors(
    tree: PyTree, table: dict[str, Any], what: str, config: VisionTransformerConfig | None = None
) -> list[TensorName]:
    """Returns the tensors of a transformer by a table of modules and arrays.

    Args:
      tree: Its specs.
      table: Path of a module to its name, or to its name and a part; a name that ends in "_" takes its suffix without a
        dot.  Path of an array to its name and its number of leading axes of size 1 in the checkpoint.
      what: The model, for the message.
      config: Gives the shape of the patch kernel.

    Raises:
      ValueError: The table lacks a parameter.
    """
    tensors, left = [], []

    def add(path: Path, spec: Any, layer: int | None):
        own = spec.shape if layer is None else spec.shape[1:]
        place, key, module = Place(path, layer), "/".join(path), "/".join(path[:-1])
        if key in table:
            name, ones = table[key]
            # A token is a row here, and a vector with leading axes of size 1 in files.
            token = path[0] in ("prefix", "pool") and path[-1] != "registers"
            shape = (1,) * ones + (own[-1:] if token else own)
            tensors.append(TensorName(name.format(layer), place, False, tuple(range(len(shape))), shape))
        elif module in table:
            name, part = table[module] if isinstance(table[module], tuple) else (table[module], (0, 1))
            suffix = "bias" if path[-1] == "bias" else "weight"
            name = f"{name}{suffix}" if name.endswith("_") else f"{name}.{suffix}"
            conv = path == ("patch", "kernel") and config is not None
            shape = (own[1], config.channels, config.patch_size, config.patch_size) if conv else None
            order = _OUT_IN_WINDOW if conv else None
            tensors.append(TensorName(name.format(layer), place, path[-1] == "kernel", order, shape, part))
        else:
            left.append(key)

    def walk(node: Any, path: Path):
        if isinstance(node, dict):
            for name, part in node.items():
                walk(part, (*path, name))
            return
        for layer in range(node.shape[0]) if path[0] == "layers" else [None]:
            add(path, node, layer)

    walk(tree, ())
    if left:
        raise ValueError(f"{what} has no tensors for {sorted(set(left))}")
    return tensors


def resnet_layout(config: ResNetConfig, layers: Iterable[tuple[Path, str, str]], head: str) -> TensorLayout:
    """Returns the layout of a residual network: ``params`` and ``batch_stats`` are the branches of one tree.

    Args:
      config: The network.
      layers: Path, name of the convolution and name of the norm of every pair of them.
      head: Name of the classifier.
    """
    tensors: list[TensorName] = []
    for path, conv, norm in layers:
        kernel = Place(("params", *path, "conv", "kernel"))
        tensors.append(TensorName(f"{conv}.weight", kernel, False, order=_OUT_IN_WINDOW))
        for suffix, branch, leaf in (
            ("weight", "params", "scale"),
            ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"),
            ("running_var", "batch_stats", "var"),
        ):
            tensors.append(TensorName(f"{norm}.{suffix}", Place((branch, *path, "norm", leaf)), False))
    if config.num_classes:
        tensors.append(TensorName(f"{head}.weight", Place(("params", "head", "kernel")), True))
        tensors.append(TensorName(f"{head}.bias", Place(("params", "head", "bias")), False))
    return TensorLayout(dict(zip(("params", "batch_stats"), resnet_specs(config), strict=True)), tensors)


def swin_layout(
    config: SwinConfig, top: dict[str, str], block: dict[str, str], roots: Callable[[int], tuple[str, str]]
) -> TensorLayout:
    """Returns the layout of a Swin transformer.

    Args:
      config: The model.
      top: Path of a module outside of the stages to its name.
      block: Path of a module of a block to its name below the block; "attn.qkv" is split into three.
      roots: Function of a stage that returns the names of the stage and of the patch merging after it.
    """
    tree, tensors = swin_specs(config), []

    def module(name: str, path: str, part: tuple[int, int] = (0, 1)) -> None:
        keys = tuple(path.split("/"))
        for leaf, spec in at(tree, keys).items():
            tensors.append(_swin_tensor(config, name, (*keys, leaf), spec.shape, part))

    for path in ("patch_embed", "embed_norm"):
        module(top[path], path)
    if config.absolute_positions:
        module(top["position"], "position")
    for stage, depth in enumerate(config.depths):
        root, merge = roots(stage)
        for index in range(depth):
            for path, name in block.items():
                part = ("qkv".index(path[-1]), 3) if name == "attn.qkv" else (0, 1)
                module(f"{root}.blocks.{index}.{name}", f"stage{stage}/block{index}/{path}", part)
        if stage + 1 < len(config.depths):
            module(f"{merge}.norm", f"stage{stage}/merge/norm")
            module(f"{merge}.reduction", f"stage{stage}/merge/reduction")
    module(top["norm"], "norm")
    if config.num_classes:
        module(top["head"], "head")
    return TensorLayout(tree, tensors)


def _swin_tensor(
    config: SwinConfig, module: str, path: Path, shape: tuple[int, ...], part: tuple[int, int]
) -> TensorName:
    leaf, place = path[-1], Place(path)
    if leaf == "embedding":
        return TensorName(f"{module}.position_embeddings", place, False, order=(0, 1, 2), shape=(1, *shape))
    if leaf == "table":
        return TensorName(f"{module}.relative_position_bias_table", place, False)
    if path == ("patch_embed", "kernel"):
        stored = (shape[1], config.channels, config.patch_size, config.patch_size)
        return TensorName(f"{module}.weight", place, False, order=_OUT_IN_WINDOW, shape=stored)
    suffix = "bias" if leaf == "bias" else "weight"
    return TensorName(f"{module}.{suffix}", place, leaf == "kernel", part=part)
