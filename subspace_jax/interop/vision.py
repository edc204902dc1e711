"""Vision models in the checkpoint folders of Hugging Face and timm, read and written."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from jax.typing import DTypeLike

from subspace_jax.interop import hf, timm
from subspace_jax.interop.config_fields import Fields, Shapes, naming, read_fields, shown, word
from subspace_jax.interop.reading import Shardings, check_depth, match_tensors, read_params
from subspace_jax.interop.safetensors_io import StoredTensor, open_folder
from subspace_jax.interop.tensors import PyTree, TensorLayout, stored_shape
from subspace_jax.interop.writing import SHARD_BYTES, write_checkpoint
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.vit.config import VisionTransformerConfig


class CheckpointFormat(Protocol):
    """How a library stores a family of models: a module of these functions.

    Attributes:
      config_from_fields: Function of the fields of ``config.json`` and the shapes of the tensors that returns a config.
      fields_from_config: Function of a config and a dtype that returns the fields.
      tensor_layout: Function of a config that returns the parameters with their tensors.
      canonical_names: Function of a config and the names in a file that returns their names in the layout; names to
        ignore are left out.
      convert: Function of a config and its parameters that returns both as the library would have them.
    """

    config_from_fields: Callable[[Fields, Shapes], Any]
    fields_from_config: Callable[[Any, str], dict[str, Any]]
    tensor_layout: Callable[[Any], TensorLayout]
    canonical_names: Callable[[Any, Iterable[str]], dict[str, str]]
    convert: Callable[[Any, PyTree], tuple[Any, PyTree]]


_FORMATS: dict[type, dict[str, CheckpointFormat]] = {
    VisionTransformerConfig: {"hf": hf.vit, "timm": timm.vit},
    ResNetConfig: {"hf": hf.resnet, "timm": timm.resnet},
    SwinConfig: {"hf": hf.swin, "timm": timm.swin},
}
_BY_MODEL_TYPE: dict[str, type] = {
    **dict.fromkeys(
        ("vit", "deit", "clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2"), VisionTransformerConfig
    ),
    "dinov2_with_registers": VisionTransformerConfig,
    "resnet": ResNetConfig,
    "swin": SwinConfig,
}
_BY_ARCHITECTURE: dict[str, type] = {
    **dict.fromkeys(("vit_", "deit"), VisionTransformerConfig),
    **dict.fromkeys(("resnet", "resnext", "tv_resnet", "wide_resnet"), ResNetConfig),
    "swin_": SwinConfig,
}


def load_vision(
    path: str | os.PathLike, dtype: DTypeLike | None = None, shardings: Shardings | None = None
) -> tuple[Any, PyTree]:
    """Reads a checkpoint folder of Hugging Face or timm directly onto devices.

    Files are memory-mapped, and each process reads the slices of its own devices only.  Of a folder with an image and a
    text tower the image tower is read; see :func:`load_dual` for both.

    Args:
      path: Folder with ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
      dtype: Dtype of the parameters; the one in the files by default.
      shardings: Tree of shardings with the structure of the parameters, or a function ``(shapes, axes) -> shardings``
        such as ``lambda shapes, axes: train.param_shardings(shapes, axes, mesh)``; all on one device by default.

    Returns:
      The config, and the parameters.

    Raises:
      ValueError: The model type or architecture is not supported, weights are pickled, tensors are missing, unexpected
        or of the wrong shape, or a file is damaged or truncated.
      FileNotFoundError: The folder or a file does not exist.
    """
    fields, file = read_fields(path), pathlib.Path(path) / "config.json"
    with naming(file):
        formats = _FORMATS[_config_type(fields)]
    stored = open_folder(path)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    library = "hf" if "model_type" in fields else "timm"
    with naming(file):
        config = formats[library].config_from_fields(fields, shapes)
    check_depth(path, getattr(config, "num_layers", 0) or sum(config.depths), stored)
    # The names of Meta's DINOv2 may come with the config of Hugging Face.
    names = formats["timm" if "pos_embed" in stored else library]
    return config, _read(path, names, config, stored, dtype, shardings)


def save_vision(
    path: str | os.PathLike,
    config: Any,
    params: PyTree,
    layout: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder that :func:`load_vision` and the library of the layout read.

    The folder appears when all is written.  With several processes all call this; the first one writes.  Class names
    and the fields of preprocessing are not part of a config: add them to the files of the folder.

    Args:
      path: Folder to write.
      config: The model.
      params: Its parameters, plain arrays, in the dtype in which they are stored.
      layout: "hf" or "timm"; that of the folder that the config came from by default.
      shard_bytes: Largest size of a file.
      overwrite: Whether the folder may exist.

    Raises:
      FileExistsError: The folder exists and is not empty, without ``overwrite``.
      ValueError: The layout can't express the model, the parameters are not those of the config, or their dtype can't
        be stored.
      TypeError: The config is of no model that this function supports.
    """
    formats = _FORMATS.get(type(config))
    if formats is None:
        raise TypeError(f"config: expected one of {[t.__name__ for t in _FORMATS]}, got {type(config).__name__}")
    if layout is None:
        layout = "timm" if getattr(config, "architecture", None) else "hf"
    if layout not in formats:
        raise ValueError(f"layout: expected 'hf' or 'timm', got {layout!r}")
    config, params = formats[layout].convert(config, params)
    tensors = formats[layout].tensor_layout(config).sorted()
    fields = functools.partial(_checked_fields, formats[layout], layout, config, tensors)
    write_checkpoint(path, fields, tensors, params, shard_bytes=shard_bytes, overwrite=overwrite)


def load_dino_params(
    flat: Mapping[str, Any], config: VisionTransformerConfig, dtype: DTypeLike | None = None
) -> PyTree:
    """Converts the tensors of DINOv2, by the names of Hugging Face or of Meta, to parameters.

    Args:
      flat: Name to array, as in a checkpoint.
      config: The model; without a mask token that of the checkpoint is ignored.
      dtype: Dtype of the parameters; that of the arrays by default.

    Raises:
      ValueError: Tensors are missing, unexpected or of the wrong shape; the message names them.
    """
    if not config.mask_token:
        flat = {name: value for name, value in flat.items() if not name.endswith("mask_token")}
    stored = {name: _InMemory(np.asarray(value)) for name, value in flat.items()}
    return _read("tensors", timm.vit if "pos_embed" in flat else hf.vit, config, stored, dtype, None)


def _read(
    path: str | os.PathLike,
    names: CheckpointFormat,
    config: Any,
    stored: Mapping[str, StoredTensor],
    dtype: DTypeLike | None,
    shardings: Shardings | None,
) -> PyTree:
    found = {new: stored[name] for name, new in names.canonical_names(config, stored).items()}
    layout = names.tensor_layout(config)
    match_tensors(path, f"a {getattr(config, 'family', type(config).__name__)!r} of this config", layout, found)
    return read_params(layout, found, shardings=shardings, dtype=dtype)


def _config_type(fields: Fields) -> type:
    if "model_type" in fields:
        return _BY_MODEL_TYPE[word(fields, "model_type", None, _BY_MODEL_TYPE)]
    if "architecture" not in fields:
        raise ValueError("expected model_type (Hugging Face) or architecture (timm), found neither")
    name = fields["architecture"]
    for start, kind in _BY_ARCHITECTURE.items():
        if isinstance(name, str) and name.startswith(start):
            return kind
    raise ValueError(
        f"architecture: {shown(name)} is not supported; expected one that begins with one of {sorted(_BY_ARCHITECTURE)}"
    )


def _checked_fields(
    names: CheckpointFormat, layout: str, config: Any, tensors: TensorLayout, dtype: str
) -> dict[str, Any]:
    """Returns the fields of ``config.json``, and checks that they give the config again."""
    fields = names.fields_from_config(config, dtype)
    again = names.config_from_fields(fields, {t.name: stored_shape(tensors.specs, t) for t in tensors.tensors})
    # Stochastic depth is not part of a checkpoint, and the architecture of timm may have been chosen here.
    ignored = ("drop_path", "architecture")
    if differs := [k for k in vars(config) if k not in ignored and getattr(config, k) != getattr(again, k)]:
        changes = ", ".join(f"{k}: {getattr(config, k)!r} would be read as {getattr(again, k)!r}" for k in differs)
        raise ValueError(f"layout: {layout!r} can't express this config; {changes}")
    return fields


class _InMemory:
    """An array that is read like a stored tensor."""

    def __init__(self, value: np.ndarray):
        self.value, self.shape, self.dtype = value, value.shape, value.dtype

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.value[index]
