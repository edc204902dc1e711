"""LoRA and DoRA adapters in the folders of Hugging Face PEFT, of language and vision models, read and written."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.adapters.api import settings_of
from subspace_jax.adapters.rules import insert
from subspace_jax.interop.peft.config import CONFIG, TENSORS, check_fields, read_fields
from subspace_jax.interop.peft.layout import (
    UNTIE,
    TiedTablesError,
    full_shape,
    layout,
    make_fields,
    tensors_of,
    version_of,
    written_out,
)
from subspace_jax.interop.peft.models import Config, peft_model, without_effect
from subspace_jax.interop.safetensors_io import StoredTensor, read_header, write_safetensors
from subspace_jax.interop.tensors import PyTree, at
from subspace_jax.interop.writing import replacing
from subspace_jax.nn import CausalLMConfig

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter of a PEFT folder.

    Attributes:
      trainable: Its arrays, for :func:`subspace_jax.adapters.bind`.
      settings: Path of each weight to its adapter config.
      fields: The fields of ``adapter_config.json``, to write them again.
      config: Config of the model.
      copies: Weights of the model in the folder: path of an adapted or saved table or head to the tensor of its base,
        ``[out, in]``, which PEFT uses instead of that of the model.
    """

    trainable: PyTree
    settings: Mapping[str, Any]
    fields: Mapping[str, Any]
    config: Config
    copies: Mapping[str, StoredTensor]


def load_peft_adapter(folder: str | os.PathLike, config: Config, *, untie: bool = False) -> PeftAdapter:
    """Reads a folder of PEFT: LoRA, rsLoRA or DoRA.

    Paths of ViT, DeiT, DINOv2 and Swin may be those of transformers 5 or 4 (PEFT reads only those of the installed
    version).  An adapter of a residual network is for both its trees, see ``load_vision``.  A head in
    ``modules_to_save`` comes with its bias.  Layers that the folder leaves out, or that have a smaller rank, are padded
    with zeros, as layers are stacked.  Factors are float32, as in PEFT.  Unknown fields that are set are logged.  A
    stored copy of an adapted embedding table is not compared with that of the model, see ``copies`` of the result.

    In a tied model PEFT adapts or saves embedding table and head separately.  If both are saved with equal values, they
    are one table here; otherwise the adapter is for the model of :func:`subspace_jax.nn.untie_causal_lm`.

    Args:
      folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
      config: The model of the adapter.
      untie: Whether an adapter of one of two tied tables is read for the untied model, see ``config`` of the result.

    Returns:
      The adapter.

    Raises:
      ValueError: A field is missing, of the wrong type, or asks for what is not implemented; tensors are missing (PEFT
        leaves those random or zero), unexpected, without the prefix, of integers, duplicated, or of the wrong shape;
        weights are pickled; or the adapter unties a tied model, without ``untie``.
      FileNotFoundError: A file does not exist.
    """
    folder = pathlib.Path(folder)
    fields = read_fields(folder)
    if not (folder / TENSORS).exists():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder}: adapter_model.bin is pickled, and reading it may run any code; convert it")
        raise FileNotFoundError(f"{folder}: has no {TENSORS}")
    tensors = tensors_by_name(folder / TENSORS)
    with _naming(folder / CONFIG):
        check_fields(fields)
        meant = written_out(fields, config, tensors)
    try:
        trainable, settings, copies = _read(folder, meant, config, tensors)
    except TiedTablesError:
        if not untie:
            raise
        config = config.replace(tied=False)
        trainable, settings, copies = _read(folder, meant, config, tensors)
    if fields.get("ensure_weight_tying") and not peft_model(config).tied:
        meant = {**meant, "ensure_weight_tying": False}
    return PeftAdapter(trainable, settings, meant, config, copies)


@contextlib.contextmanager
def _naming(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise (TiedTablesError if isinstance(error, TiedTablesError) else ValueError)(f"{file}: {error}") from error


def _read(
    folder: pathlib.Path, fields: Mapping[str, Any], config: Config, stored: Mapping[str, StoredTensor]
) -> tuple[PyTree, dict[str, Any], dict[str, StoredTensor]]:
    """Returns the arrays, their configs, and copies; all shapes are checked before the first array is made."""
    with _naming(folder / CONFIG):
        settings, names = layout(fields, config, version_of(config, stored))
    file, specs, left = folder / TENSORS, peft_model(config).specs, dict(stored)
    found: dict[tuple[str, str], list] = {}
    for path, modules in names.items():
        shape = at(specs, path.split("/")).shape
        for module, layer in modules.items():
            for name, (suffix, wanted, order) in tensors_of(settings[path], path, shape, layer).items():
                full = f"{module}{suffix}"
                if (tensor := left.pop(full, None)) is None:
                    raise ValueError(f"{file}: the tensor {_PREFIX}{full} is missing")
                if tensor.shape != wanted:
                    raise ValueError(f"{file}: {_PREFIX}{full}: expected {wanted}, got {tensor.shape}")
                if not jnp.issubdtype(tensor.dtype, jnp.floating):
                    raise ValueError(f"{file}: {_PREFIX}{full}: expected floating point, got {tensor.dtype}")
                found.setdefault((path, name), []).append((tensor, order, layer))
    alone = [(module, path) for path, modules in names.items() for module, layer in modules.items() if layer is None]
    path_of = {f"{module}.{own}.weight": path for module, path in alone for own in ("base_layer", "original_module")}
    copies = {path_of[name]: tensor for name, tensor in left.items() if name in path_of}
    # With save_embedding_layers a saved module is stored twice, and PEFT reads the plain name.
    unread = {*path_of, *(f"{module}.modules_to_save.weight" for module, _ in alone)}
    left = [n for n in left if n not in unread and not n.endswith(".base_layer.weight")]
    left = [n for n in left if not without_effect(n.split(".lora_")[0])]
    if left:
        raise ValueError(f"{file}: tensors that no target has: {[_PREFIX + name for name in sorted(left)][:5]}")
    trainable: dict = {}
    for (path, name), parts in found.items():
        value = _array(parts, full_shape(settings[path], at(specs, path.split("/")).shape, name))
        if value is None:
            raise TiedTablesError(f"{file}: {path} and the head differ: {UNTIE}")
        insert(trainable, f"{path}/{name}", jnp.asarray(value))
    return trainable, settings, copies


def _array(parts: list[tuple[StoredTensor, tuple[int, ...], int | None]], shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns an array from the tensors of its layers; None if the tensors of an unstacked array differ."""
    values = [(np.asarray(t.read()).astype(np.float32).transpose(order), layer) for t, order, layer in parts]
    if values[0][1] is None:
        same = all(np.array_equal(values[0][0], value, equal_nan=True) for value, _ in values[1:])
        return values[0][0].reshape(shape) if same else None
    array = np.zeros(shape, np.float32)
    for value, layer in values:
        array[(layer, *(slice(0, n) for n in value.shape))] = value
    return array


def tensors_by_name(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of an adapter's file by name, without prefix, adapter's name and suffix of DoRA's magnitude.

    Raises:
      ValueError: A name lacks the prefix, or two are the same.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in read_header(file)[0].items():
        if not name.startswith(_PREFIX):
            raise ValueError(f"{file}: {name}: lacks the prefix {_PREFIX!r}; PEFT would silently load nothing")
        plain = re.sub(r"\.default(?=\.|$)", "", name.removeprefix(_PREFIX))
        plain = re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", plain)
        if plain in tensors:
            raise ValueError(f"{file}: {tensors[plain].name} and {name} are two tensors of one name, {plain}")
        tensors[plain] = tensor
    return tensors


def save_peft_adapter(
    folder: str | os.PathLike,
    config: Config,
    trainable: PyTree,
    settings: Mapping[str, Any],
    *,
    base_model: str = "",
    fields: Mapping[str, Any] | None = None,
    names: str = "v5",
) -> None:
    """Writes a folder that PEFT reads.

    The folder appears when all is written: an error before, such as a full disk, leaves an older one unchanged.

    Args:
      folder: Folder to write; an adapter in it is replaced, other files are kept.
      config: The model.
      trainable: Adapters of its parameters.
      settings: Their rules, LoRA, DoRA or Full only.
      base_model: Name or folder of the checkpoint that the adapter belongs to.
      fields: Fields of an adapter that was read, to write them again; made from the settings by default.
      names: "v5" for the paths that ViT, DeiT and Swin have in transformers 5, "v4" for those of 4; fields that were
        read name the paths of one of them.

    Raises:
      ValueError: A config has no counterpart in PEFT; LoRA and DoRA, two kinds of scale or several dropouts are mixed;
        or the fields are not those of these adapters.
      OSError: Writing failed.
    """
    chosen = settings_of(trainable, settings)
    made = fields or make_fields(config, chosen, base_model, names)
    check_fields(made)
    expected, modules_of = layout(written_out(made, config), config, names)
    specs, tensors = peft_model(config).specs, {}
    if expected.keys() != chosen.keys():
        raise ValueError(f"fields: mean {sorted(expected)}, the adapters are of {sorted(chosen)}")
    for path, own in chosen.items():
        wanted = expected[path]
        same = type(own) is type(wanted) and own.rank == wanted.rank
        if not same or not (own.trains_weight or own.scale == wanted.scale):
            raise ValueError(f"fields: mean {wanted} for {path}, the adapter is {own}")
    for path, modules in modules_of.items():
        shape, own = at(specs, path.split("/")).shape, at(trainable, path.split("/"))
        for module, layer in modules.items():
            for name, (suffix, stored, order) in tensors_of(expected[path], path, shape, layer).items():
                value = np.asarray(own[name] if layer is None else own[name][layer], np.float32)
                size = tuple(stored[axis] for axis in order)
                value = value.reshape(size) if layer is None else value[tuple(slice(0, n) for n in size)]
                tensors[f"{_PREFIX}{module}{suffix}"] = np.ascontiguousarray(value.transpose(np.argsort(order)))
    tensors = dict(sorted(tensors.items()))
    shapes = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    with replacing(pathlib.Path(folder), _is_adapter_file) as new:
        write_safetensors(new / TENSORS, shapes, tensors.values())
        (new / CONFIG).write_text(json.dumps(dict(made), indent=2, sort_keys=True) + "\n")


def _is_adapter_file(name: str) -> bool:
    # An older pickled adapter would be a different one.
    return name in (CONFIG, TENSORS, "adapter_model.bin")


def peft_fields(
    config: CausalLMConfig, trainable: PyTree, settings: Mapping[str, Any], *, base_model: str = ""
) -> dict[str, Any]:
    """Returns the fields of ``adapter_config.json``; raises if PEFT has no counterpart of the adapters.

    Args:
      config: The model.
      trainable: Adapters of its parameters, of arrays or of shapes.
      settings: Their rules.
      base_model: Name or folder of the checkpoint that the adapter belongs to.

    Raises:
      ValueError: See :func:`save_peft_adapter`.
    """
    return make_fields(config, settings_of(trainable, settings), base_model)
