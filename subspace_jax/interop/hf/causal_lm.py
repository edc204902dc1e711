"""Causal language models from Hugging Face checkpoint folders, straight onto devices."""

import os
import pathlib

from jax.typing import DTypeLike

from subspace_jax.interop.hf.causal_lm_config import config_from_hf, token_ids
from subspace_jax.interop.hf.config_fields import naming, read_fields, read_json
from subspace_jax.interop.hf.names import is_buffer, tensor_names
from subspace_jax.interop.placing import PyTree, Shardings, check_depth, match_tensors, read_params
from subspace_jax.interop.safetensors_io import StoredTensor, has_weights, open_folder
from subspace_jax.nn import CausalLMConfig, Model, causal_lm_specs

_HEAD = "lm_head.weight"


def load_causal_lm(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[CausalLMConfig, PyTree]:
    """Reads a checkpoint folder of GPT-2, Llama, Mistral or Qwen2 straight onto devices.

    Files are mapped, and each process reads the slices of its own devices only.  What it holds at a time, beside the
    arrays themselves, is one device's share of one table, or of the layers of a kernel that take 32 MiB.

    Args:
      folder: Has ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
      shardings: Tree of shardings with the layout of the parameters, or a function ``(shapes, axes) -> shardings``
        such as ``lambda shapes, axes: train.param_shardings(shapes, axes, mesh)``; all on one device by default.
      dtype: Type of the parameters; the one in the files by default.

    Returns:
      The config as of :func:`read_config`, and the parameters as :func:`subspace_jax.nn.causal_lm_specs` lays them out.

    Raises:
      ValueError: The architecture is not supported, weights are pickled, tensors are missing, unexpected or of
        the wrong shape, or a file is damaged or cut off.
      FileNotFoundError: The folder or a file is not there.
    """
    config, stored = _open(folder, _config_of_fields(folder))
    return config, read_params(causal_lm_specs(config), tensor_names(config), stored, shardings=shardings, dtype=dtype)


def from_pretrained(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> Model:
    """Reads a checkpoint folder as a module; see :func:`load_causal_lm`."""
    return Model(*load_causal_lm(folder, shardings=shardings, dtype=dtype))


def read_config(folder: str | os.PathLike) -> CausalLMConfig:
    """Reads the config of a checkpoint folder of a language model.

    A config that ties head and embedding is untied where the weights beside it hold a head that differs from the
    embedding table, as transformers 5 does; the two are compared slice by slice.

    The tokens that open, end and fill texts are those of ``generation_config.json``, where it is there and names them.

    Args:
      folder: Has ``config.json``, and weights or none.

    Raises:
      ValueError: A field can't be read (see :func:`config_from_hf`), the folder is a run's or an adapter's, or the
        weights are not those of the config.
      FileNotFoundError: There is no ``config.json``.
    """
    config = _config_of_fields(folder)
    return _open(folder, config)[0] if has_weights(folder) else config


def _config_of_fields(folder: str | os.PathLike) -> CausalLMConfig:
    fields = read_fields(folder)
    with naming(pathlib.Path(folder) / "config.json"):
        config = config_from_hf(fields)
    file = pathlib.Path(folder) / "generation_config.json"
    if not file.is_file():
        return config
    generation = read_json(file)
    with naming(file):
        # What it names counts, as in transformers.
        return config.replace(
            **{name: tokens for name, tokens in token_ids(generation).items() if tokens not in (None, ())}
        )


def _open(folder: str | os.PathLike, config: CausalLMConfig) -> tuple[CausalLMConfig, dict[str, StoredTensor]]:
    """The tensors of a folder by the names of the family, and the config, untied where they have a head of its own."""
    stored = open_folder(folder)
    check_depth(folder, config.num_layers, stored)
    if config.family == "gpt2" and not any(name.startswith("transformer.") for name in stored):
        # The first files were those of the bare decoder.
        stored = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in stored.items()}
    stored = {name: t for name, t in stored.items() if not is_buffer(name)}
    table = "transformer.wte.weight" if config.family == "gpt2" else "model.embed_tokens.weight"
    if config.tied and _HEAD in stored:
        # A file may hold the table by the name of the head alone.
        if stored[_HEAD].equals(stored.setdefault(table, stored[_HEAD])):
            del stored[_HEAD]
        else:
            config = config.replace(tied=False)
    what = f"a {config.family!r} with {config.num_layers} layers"
    match_tensors(folder, what, causal_lm_specs(config), tensor_names(config), stored)
    return config, stored
