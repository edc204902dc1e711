"""LoRA and DoRA adapters as Hugging Face PEFT folders, in and out, of language and of vision models."""

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

from subspace_jax.adapters import DoRA, LoRA
from subspace_jax.adapters.api import settings_of
from subspace_jax.adapters.rules import insert
from subspace_jax.interop.hf.causal_lm_write import replacing
from subspace_jax.interop.peft.config import CONFIG, TENSORS, check_fields, read_fields
from subspace_jax.interop.peft.layout import (
    UNTIE,
    Config,
    TiedTablesError,
    at,
    full_shape,
    is_tied,
    layout,
    make_fields,
    specs_of,
    tensors_of,
    version_of,
    written_out,
)
from subspace_jax.interop.peft.vision import without_effect
from subspace_jax.interop.safetensors_io import StoredTensor, read_header, write_safetensors
from subspace_jax.nn import CausalLMConfig

PyTree = Any

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as it was read.

    Attributes:
      trainable: Its arrays, for :func:`subspace_jax.adapters.bind`.
      settings: Path of each weight to its setting.
      fields: Those of ``adapter_config.json``, to be written again.
      config: That of the model whose parameters the paths are of.
      copies: What the folder holds of the model itself: path of an adapted or saved table or head to the tensor of its
        base, ``[out, in]``, which PEFT uses instead of the model's.
    """

    trainable: PyTree
    settings: Mapping[str, Any]
    fields: Mapping[str, Any]
    config: Config
    copies: Mapping[str, StoredTensor]


def load_peft_adapter(folder: str | os.PathLike, config: Config, *, untie: bool = False) -> PeftAdapter:
    """Reads a folder that PEFT wrote, LoRA, rsLoRA or DoRA.

    Paths of ViT, DeiT, DINOv2 and Swin may be those of transformers 5 or of 4 (PEFT itself takes only those of the
    version that it runs on).  An adapter of a residual network is for both its trees, as ``load_vision`` gives them.
    A head under ``modules_to_save`` comes with its bias.  Layers that the folder leaves out, or gives another rank,
    are filled up with zeros, because our layers are stacked.  Factors come as float32, as PEFT has them.  Fields that
    are set and unknown are logged.  A stored copy of an adapted embedding is not compared with the model's, see
    ``copies`` of the result.

    PEFT adapts or saves the embedding and the head of a tied model one without the other.  Where both are saved with
    equal numbers, they are one table here, too; otherwise the adapter is of the model that
    :func:`subspace_jax.nn.untie_causal_lm` returns.

    Args:
      folder: Has ``adapter_config.json`` and ``adapter_model.safetensors``.
      config: The model that it is for.
      untie: Whether an adapter of one of two tied tables is read for the untied model, see ``config`` of the result.

    Returns:
      The adapter.

    Raises:
      ValueError: A field is missing, of the wrong type, or asks for what is not implemented, tensors are missing (PEFT
        leaves those random or zero), left over, without the prefix, of integers, of two names, or of the wrong shape,
        weights are pickled, or the adapter unties a tied model, without ``untie``.
      FileNotFoundError: A file is not there.
    """
    folder = pathlib.Path(folder)
    fields = read_fields(folder)
    if not (folder / TENSORS).exists():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder}: adapter_model.bin is pickled, and reading it may run any code; convert it")
        raise FileNotFoundError(f"{folder}: has no {TENSORS}")
    tensors = _tensors_by_name(folder / TENSORS)
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
    if fields.get("ensure_weight_tying") and not is_tied(config):
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
    """The arrays, all of whose shapes are looked at before the first one is made, their settings, and copies."""
    with _naming(folder / CONFIG):
        settings, names = layout(fields, config, version_of(config, stored))
    file, specs, left = folder / TENSORS, specs_of(config), dict(stored)
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
    # With save_embedding_layers a module that is saved comes twice, and PEFT reads the plain name.
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
    """One of our arrays, of the tensors of its layers; None where tensors of the same one differ."""
    values = [(np.asarray(t.read()).astype(np.float32).transpose(order), layer) for t, order, layer in parts]
    if values[0][1] is None:
        same = all(np.array_equal(values[0][0], value, equal_nan=True) for value, _ in values[1:])
        return values[0][0].reshape(shape) if same else None
    array = np.zeros(shape, np.float32)
    for value, layer in values:
        array[(layer, *(slice(0, n) for n in value.shape))] = value
    return array


def _tensors_by_name(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors by their names without what comes and goes: prefix, name of the adapter, a wrapper of DoRA's."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in read_header(file)[0].items():
        if not name.startswith(_PREFIX):
            raise ValueError(f"{file}: {name}: lacks the prefix {_PREFIX!r}; PEFT would load nothing in silence")
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

    The folder appears when all is written: whatever goes wrong before, a full disk among it, leaves an older one as it
    was.

    Args:
      folder: Where to write; made where there is none.  An adapter in it is replaced, its other files stay.
      config: The model.
      trainable: Adapters of its parameters.
      settings: Their rules, LoRA, DoRA or Full only.
      base_model: Name or folder of the checkpoint that the adapter belongs to.
      fields: Those of an adapter that was read, to be written as they were; made from the settings by default.
      names: "v5" for the paths that ViT, DeiT and Swin have on transformers 5, "v4" for those on 4; fields that were
        read name the paths of one of them.

    Raises:
      ValueError: A setting has no counterpart in PEFT, LoRA and DoRA, two kinds of scale or several dropouts are mixed,
        or the fields are not those of these adapters.
      OSError: Writing failed.
    """
    chosen = settings_of(trainable, settings)
    made = fields or make_fields(config, chosen, base_model, names)
    check_fields(made)
    expected, modules_of = layout(written_out(made, config), config, names)
    specs, tensors = specs_of(config), {}
    if expected.keys() != chosen.keys():
        raise ValueError(f"fields: mean {sorted(expected)}, the adapters are of {sorted(chosen)}")
    for path, setting in chosen.items():
        if isinstance(setting, LoRA | DoRA) and (type(setting), setting.rank, setting.scale) != (
            type(expected[path]),
            expected[path].rank,
            expected[path].scale,
        ):
            raise ValueError(f"fields: mean {expected[path]} for {path}, the adapter is {setting}")
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
    # An older pickled adapter would be read by nobody, and be another one.
    return name in (CONFIG, TENSORS, "adapter_model.bin")


def peft_fields(
    config: CausalLMConfig, trainable: PyTree, settings: Mapping[str, Any], *, base_model: str = ""
) -> dict[str, Any]:
    """Makes the fields of ``adapter_config.json``, and so finds out whether PEFT has a counterpart of adapters.

    Args:
      config: The model.
      trainable: Adapters of its parameters, of arrays or of shapes.
      settings: Their rules.
      base_model: Name or folder of the checkpoint that the adapter belongs to.

    Raises:
      ValueError: See :func:`save_peft_adapter`.
    """
    return make_fields(config, settings_of(trainable, settings), base_model)
