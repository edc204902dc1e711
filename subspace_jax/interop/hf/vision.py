"""Vision models from checkpoint folders of Hugging Face and timm, straight onto devices, and back."""

import functools
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from subspace_jax.interop.hf import resnet_names, swin_names
from subspace_jax.interop.hf import vit_names as vision_transformer_names
from subspace_jax.interop.hf.causal_lm_write import SHARD_BYTES, write_checkpoint
from subspace_jax.interop.hf.config_fields import naming, read_fields, shown, word
from subspace_jax.interop.placing import Shardings, check_depth, match_tensors, read_params, stored_shape
from subspace_jax.interop.safetensors_io import StoredTensor, open_folder
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.vit.config import VisionTransformerConfig

PyTree = Any

# A family is a module with config_from_hf(fields), config_from_timm(fields, shapes), config_to_hf(config, dtype),
# config_to_timm(config), tensor_names(config, layout) and specs(config), and where it needs them with complete(config,
# fields, shapes), canonical_name(config, name, layout) or canonical_names(config, names, layout), and
# converted(config, params, layout).
_BY_MODEL_TYPE: dict[str, ModuleType] = {
    "vit": vision_transformer_names,
    "deit": vision_transformer_names,
    "clip": vision_transformer_names,
    "clip_vision_model": vision_transformer_names,
    "siglip": vision_transformer_names,
    "siglip_vision_model": vision_transformer_names,
    "dinov2": vision_transformer_names,
    "dinov2_with_registers": vision_transformer_names,
    "resnet": resnet_names,
    "swin": swin_names,
}
_BY_TIMM_NAME: dict[str, ModuleType] = {
    "vit_": vision_transformer_names,
    "deit": vision_transformer_names,
    "resnet": resnet_names,
    "resnext": resnet_names,
    "tv_resnet": resnet_names,
    "wide_resnet": resnet_names,
    "swin_": swin_names,
}
_BY_CONFIG: dict[type, ModuleType] = {
    VisionTransformerConfig: vision_transformer_names,
    ResNetConfig: resnet_names,
    SwinConfig: swin_names,
}


def load_vision(
    path: str | os.PathLike, dtype: DTypeLike | None = None, shardings: Shardings | None = None
) -> tuple[Any, PyTree]:
    """Reads a checkpoint folder of Hugging Face or timm straight onto devices.

    Files are mapped, and each process reads the slices of its own devices only.  Of a folder with towers for images and
    texts the one for images is read; see :func:`load_dual` for both.

    Args:
      path: Has ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
      dtype: Type of the parameters; the one in the files by default.
      shardings: Tree of shardings with the layout of the parameters, or a function ``(shapes, axes) -> shardings``
        such as ``lambda shapes, axes: train.param_shardings(shapes, axes, mesh)``; all on one device by default.

    Returns:
      The config, and the parameters.

    Raises:
      ValueError: The model type or architecture is not supported, weights are pickled, tensors are missing, unexpected
        or of the wrong shape, or a file is damaged or cut off.
      FileNotFoundError: The folder or a file is not there.
    """
    fields, file = read_fields(path), pathlib.Path(path) / "config.json"
    with naming(file):
        family = _family(fields)
    stored = open_folder(path)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    with naming(file):
        config = family.config_from_hf(fields) if "model_type" in fields else family.config_from_timm(fields, shapes)
        if hasattr(family, "complete"):
            config = family.complete(config, fields, shapes)
    check_depth(path, getattr(config, "num_layers", 0) or sum(config.depths), stored)
    # Meta's own names of DINOv2 may stand beside Hugging Face's config.
    layout = "timm" if "model_type" not in fields or "pos_embed" in stored else "hf"
    return config, _read(path, family, config, layout, stored, dtype, shardings)


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

    The folder appears when all is written.  With several processes all call this; the first one writes.  Names of
    classes and the fields of preprocessing are not part of a config: add them to the folder's files.

    Args:
      path: Where to write.
      config: The model.
      params: Its parameters, plain arrays, in the type in which they are to be stored.
      layout: "hf" or "timm"; that of the folder that the config came from by default.
      shard_bytes: Weights are split into files of at most this size.
      overwrite: Whether the folder may be there.

    Raises:
      FileExistsError: The folder is there and not empty, without ``overwrite``.
      ValueError: The layout can't express the model, the parameters are not those of the config, or their type can't
        be stored.
      TypeError: The config is of no model that this function knows.
    """
    family = _BY_CONFIG.get(type(config))
    if family is None:
        raise TypeError(f"config: expected one of {[t.__name__ for t in _BY_CONFIG]}, got {type(config).__name__}")
    if layout is None:
        layout = "timm" if getattr(config, "architecture", None) else "hf"
    if layout not in ("hf", "timm"):
        raise ValueError(f"layout: expected 'hf' or 'timm', got {layout!r}")
    if hasattr(family, "converted"):
        config, params = family.converted(config, params, layout)
    tensors = sorted(family.tensor_names(config, layout), key=lambda t: (t.name, t.part))
    specs = family.specs(config)
    fields = functools.partial(_fields, family, config, layout, {t.name: stored_shape(specs, t) for t in tensors})
    write_checkpoint(path, fields, specs, tensors, params, shard_bytes=shard_bytes, overwrite=overwrite)


def load_dino_params(
    flat: Mapping[str, Any], config: VisionTransformerConfig, dtype: DTypeLike | None = None
) -> PyTree:
    """Lays out DINOv2's tensors, by Hugging Face's names or by Meta's own, as parameters.

    Args:
      flat: Name to array, as a checkpoint has them.
      config: The model; a mask token that it has not is passed over.
      dtype: Type of the parameters; that of the arrays by default.

    Raises:
      ValueError: Tensors are missing, unexpected or of the wrong shape; the message names them.
    """
    if not config.mask_token:
        flat = {name: value for name, value in flat.items() if not name.endswith("mask_token")}
    stored = {name: _InMemory(np.asarray(value)) for name, value in flat.items()}
    layout = "timm" if "pos_embed" in flat else "hf"
    return _read("tensors", vision_transformer_names, config, layout, stored, dtype, None)


def renamed(
    family: ModuleType, config: Any, layout: str, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors of a folder by the names that a family gives to them, without those to ignore."""
    if hasattr(family, "canonical_names"):
        return {new: stored[name] for name, new in family.canonical_names(config, stored, layout).items()}
    canonical = getattr(family, "canonical_name", lambda config, name, layout: name)
    names = {name: canonical(config, name, layout) for name in stored}
    return {new: stored[name] for name, new in names.items() if new is not None}


def _read(path, family: ModuleType, config, layout: str, stored, dtype, shardings) -> PyTree:
    found = renamed(family, config, layout, stored)
    tensors, specs = family.tensor_names(config, layout), family.specs(config)
    match_tensors(path, f"a {getattr(config, 'family', type(config).__name__)!r} of this config", specs, tensors, found)
    return read_params(specs, tensors, found, shardings=shardings, dtype=dtype)


def _family(fields: Mapping[str, Any]) -> ModuleType:
    if "model_type" in fields:
        return _BY_MODEL_TYPE[word(fields, "model_type", None, _BY_MODEL_TYPE)]
    if "architecture" not in fields:
        raise ValueError("expected model_type (Hugging Face) or architecture (timm), found neither")
    name = fields["architecture"]
    for start, family in _BY_TIMM_NAME.items():
        if isinstance(name, str) and name.startswith(start):
            return family
    raise ValueError(
        f"architecture: {shown(name)} is not supported; expected one that begins with one of {sorted(_BY_TIMM_NAME)}"
    )


def _fields(family: ModuleType, config: Any, layout: str, shapes: Mapping[str, tuple], dtype: str) -> dict[str, Any]:
    """Fields of ``config.json``, after a look at whether they mean the config that they are made of."""
    if layout == "hf":
        fields = family.config_to_hf(config, dtype)
        again = family.config_from_hf(fields)
    else:
        fields = family.config_to_timm(config)
        again = family.config_from_timm(fields, shapes)
    if hasattr(family, "complete"):
        again = family.complete(again, fields, shapes)
    # How blocks are left out in training is no part of a checkpoint, and timm's name may have been chosen here.
    apart = ("drop_path", "architecture")
    if differs := [k for k in vars(config) if k not in apart and getattr(config, k) != getattr(again, k)]:
        shown = ", ".join(f"{k}: {getattr(config, k)!r} would be read as {getattr(again, k)!r}" for k in differs)
        raise ValueError(f"layout: {layout!r} can't express this config; {shown}")
    return fields


class _InMemory:
    """An array that is read as a stored tensor is."""

    def __init__(self, value: np.ndarray):
        self.value, self.shape, self.dtype = value, value.shape, value.dtype

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self.value[index]
