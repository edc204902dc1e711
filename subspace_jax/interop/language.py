"""Language models in files: a Hugging Face folder, a GGUF file, or a folder of compressed kernels."""

import os

from jax.typing import DTypeLike

from subspace_jax.interop import compressed, gguf
from subspace_jax.interop.hf import causal_lm
from subspace_jax.interop.reading import Shardings
from subspace_jax.interop.tensors import PyTree
from subspace_jax.nn import CausalLMConfig, Model


def load_causal_lm(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[CausalLMConfig, PyTree]:
    """Reads a language model directly onto devices.

    Files are memory-mapped, and each process reads the slices of its own devices only.  Beside the arrays it holds one
    shard of one table at a time, or of layers of a kernel of 32 MiB.

    Args:
      folder: Folder with ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``; or
        a GGUF file, see :func:`subspace_jax.interop.gguf.load_causal_lm`; or a folder that
        :func:`save_compressed` wrote.
      shardings: Tree of shardings with the structure of the parameters, or a function ``(shapes, axes) -> shardings``
        such as ``lambda shapes, axes: train.param_shardings(shapes, axes, mesh)``; all on one device by default.
      dtype: Dtype of the parameters; the one in the files by default.

    Returns:
      The config, see :func:`read_config`, and the parameters, see :func:`subspace_jax.nn.causal_lm_specs`.

    Raises:
      ValueError: The architecture is not supported, weights are pickled, tensors are missing, unexpected or of
        the wrong shape, or a file is damaged or truncated.
      FileNotFoundError: The folder or a file does not exist.
    """
    return _module(folder).load_causal_lm(folder, shardings=shardings, dtype=dtype)


def from_pretrained(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> Model:
    """Reads a language model as a module; see :func:`load_causal_lm`."""
    return Model(*load_causal_lm(folder, shardings=shardings, dtype=dtype))


def read_config(folder: str | os.PathLike) -> CausalLMConfig:
    """Reads the config of a language model.

    Of a folder, a config with a tied head is untied if the weights have a head that differs from the embedding table,
    as in transformers 5, and the BOS, EOS and padding tokens of ``generation_config.json`` take precedence.  Of a GGUF
    file see :func:`subspace_jax.interop.gguf.read_config`.

    Args:
      folder: Folder with ``config.json``, with or without weights, or a GGUF file.

    Raises:
      ValueError: A field can't be read (see :func:`config_from_hf`), the folder is a run or an adapter, or the
        weights are not those of the config.
      FileNotFoundError: There is no ``config.json``.
    """
    return _module(folder).read_config(folder)


def _module(folder: str | os.PathLike):
    if compressed.is_compressed(folder):
        return compressed
    return gguf if gguf.is_gguf(folder) else causal_lm
