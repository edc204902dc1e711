"""Causal language models in the checkpoint folders of Hugging Face, read and written."""

import functools
import os
import pathlib
from collections.abc import Mapping

from jax.typing import DTypeLike

from subspace_jax.data.json_object import read_json_object
from subspace_jax.interop.config_fields import naming, read_fields
from subspace_jax.interop.hf.causal_lm_config import config_from_hf, config_to_hf, token_ids
from subspace_jax.interop.hf.causal_lm_names import is_buffer, tensor_names
from subspace_jax.interop.reading import Shardings, check_depth, match_tensors, read_params
from subspace_jax.interop.safetensors_io import StoredTensor, has_weights, open_folder
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.interop.writing import SHARD_BYTES, write_checkpoint
from subspace_jax.nn import CausalLMConfig, Model, causal_lm_specs, stack_layers

_HEAD = "lm_head.weight"


def load_causal_lm(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[CausalLMConfig, PyTree]:
    """Reads a checkpoint folder; see :func:`subspace_jax.interop.load_causal_lm`."""
    config, stored = _open(folder, config_of_fields(folder))
    return config, read_params(_layout(config), stored, shardings=shardings, dtype=dtype)


def save_causal_lm(
    folder: str | os.PathLike,
    config: CausalLMConfig,
    params: PyTree,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    side_files: Mapping[str, pathlib.Path] | None = None,
) -> None:
    """Writes a checkpoint folder that :func:`load_causal_lm` and Hugging Face transformers read.

    One tensor at a time is copied to the host.  The folder appears when all is written: an error before, such as a full
    disk, leaves an older folder unchanged.  With several processes all call this; the first one writes.

    Args:
      folder: Folder to write.
      config: The model.
      params: Its parameters, plain arrays, in the dtype in which they are stored; unstacked layers are stacked first.
      shard_bytes: Largest size of a file; a larger tensor has a file of its own.
      overwrite: Whether the folder may exist; its weights and config are replaced, other files (a tokenizer) are kept.
      side_files: Files to copy into the folder, by their names there; see :func:`subspace_jax.interop.side_files`.

    Raises:
      FileExistsError: The folder exists and is not empty, without ``overwrite``.
      ValueError: The parameters are not those of the config, or their dtype can't be stored.
      OSError: Writing failed.
    """
    write_checkpoint(
        folder,
        functools.partial(config_to_hf, config),
        _layout(config),
        stack_layers(params),
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        side_files=side_files,
    )


def save_pretrained(model: Model, folder: str | os.PathLike, **options) -> None:
    """Writes a module as a checkpoint folder; for options see :func:`save_causal_lm`."""
    save_causal_lm(folder, model.config, model.params, **options)


def read_config(folder: str | os.PathLike) -> CausalLMConfig:
    """Reads the config of a checkpoint folder; see :func:`subspace_jax.interop.read_config`."""
    config = config_of_fields(folder)
    return _open(folder, config)[0] if has_weights(folder) else config


def config_of_fields(folder: str | os.PathLike) -> CausalLMConfig:
    """Reads the config of a folder from its JSON files alone."""
    fields = read_fields(folder)
    with naming(pathlib.Path(folder) / "config.json"):
        config = config_from_hf(fields)
    file = pathlib.Path(folder) / "generation_config.json"
    if not file.is_file():
        return config
    generation = read_json_object(file)
    with naming(file):
        # Takes precedence, as in transformers.
        return config.replace(
            **{name: tokens for name, tokens in token_ids(generation).items() if tokens not in (None, ())}
        )


def _open(folder: str | os.PathLike, config: CausalLMConfig) -> tuple[CausalLMConfig, dict[str, StoredTensor]]:
    """Returns the config, untied if the tensors have a separate head, and the tensors by the names of the family."""
    stored = open_folder(folder)
    check_depth(folder, config.num_layers, stored)
    if config.family == "gpt2" and not any(name.startswith("transformer.") for name in stored):
        # The first files hold the decoder alone.
        stored = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in stored.items()}
    stored = {name: t for name, t in stored.items() if not is_buffer(name)}
    table = "transformer.wte.weight" if config.family == "gpt2" else "model.embed_tokens.weight"
    if config.tied and _HEAD in stored:
        # A file may hold the table under the name of the head only.
        if stored[_HEAD].equals(stored.setdefault(table, stored[_HEAD])):
            del stored[_HEAD]
        else:
            config = config.replace(tied=False)
    what = f"a {config.family!r} with {config.num_layers} layers"
    match_tensors(folder, what, _layout(config), stored)
    return config, stored


def _layout(config: CausalLMConfig) -> TensorLayout:
    return TensorLayout(causal_lm_specs(config), tensor_names(config))
