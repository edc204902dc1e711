"""Causal language models from Hugging Face checkpoint folders, straight onto devices."""

import os
import pathlib

from jax.typing import DTypeLike

from subspace_jax.interop.hf_config import read_config
from subspace_jax.interop.names import TensorName, is_buffer, tensor_names
from subspace_jax.interop.placing import PyTree, Shardings, match_tensors, read_params
from subspace_jax.interop.safetensors_io import StoredTensor, open_folder
from subspace_jax.nn import CausalLM, CausalLMConfig, causal_lm_specs


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
      The config, and the parameters as :func:`subspace_jax.nn.causal_lm_specs` lays them out.

    Raises:
      ValueError: The architecture is not supported, weights are pickled, tensors are missing, unexpected or of
        the wrong shape, or a file is damaged or cut off.
      FileNotFoundError: The folder or a file is not there.
    """
    config = read_config(folder)
    tensors = tensor_names(config)
    stored = _match(pathlib.Path(folder), config, tensors, open_folder(folder))
    return config, read_params(causal_lm_specs(config), tensors, stored, shardings=shardings, dtype=dtype)


def from_pretrained(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> CausalLM:
    """Reads a checkpoint folder as a module; see :func:`load_causal_lm`."""
    return CausalLM(*load_causal_lm(folder, shardings=shardings, dtype=dtype))


def _match(
    folder: pathlib.Path, config: CausalLMConfig, tensors: list[TensorName], stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Finds every tensor that the model needs, and refuses files that hold fewer, more, or others."""
    if config.family == "gpt2" and not any(name.startswith("transformer.") for name in stored):
        # The first files were those of the bare decoder.
        stored = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in stored.items()}
    stored = {name: t for name, t in stored.items() if not is_buffer(name)}
    if config.tied:
        stored.pop("lm_head.weight", None)
    what = f"a {config.family!r} with {config.num_layers} layers"
    match_tensors(folder, what, causal_lm_specs(config), tensors, stored)
    return stored
