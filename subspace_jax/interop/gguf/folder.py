"""A GGUF file converted to a Hugging Face folder."""

import json
import os
import pathlib

import numpy as np

from subspace_jax.interop.gguf.models import layout_of, open_causal_lm
from subspace_jax.interop.gguf.tokenizer import tokenizer_files
from subspace_jax.interop.hf.causal_lm_config import config_to_hf
from subspace_jax.interop.writing import replacing, write_side_files, write_weights


def to_folder(path: str | os.PathLike, out: str | os.PathLike) -> None:
    """Writes the model of a GGUF file as a Hugging Face folder: float32 weights, config and tokenizer.

    One tensor at a time is in memory.  The folder appears when all is written.

    Args:
      path: The file.
      out: Folder to write; not there yet, or empty.

    Raises:
      ValueError: The model or its tokenizer is not supported, or the file is damaged; see
        :func:`subspace_jax.interop.gguf.load_causal_lm` and :func:`subspace_jax.interop.gguf.tokenizer_files`.
      FileNotFoundError: There is no such file.
      FileExistsError: ``out`` is there and not empty.
      OSError: Writing failed.
    """
    out = pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not empty")
    config, stored = open_causal_lm(path)
    files = tokenizer_files(path)
    names = [tensor.name for tensor in layout_of(config).tensors]
    single = np.dtype(np.float32)
    with replacing(out, lambda name: False) as folder:
        write_side_files(folder, files)
        (folder / "config.json").write_text(json.dumps(config_to_hf(config), indent=2, sort_keys=True) + "\n")
        tensors = (stored[name].read().astype(single, copy=False) for name in names)
        write_weights(folder, {name: (stored[name].shape, single) for name in names}, tensors)
