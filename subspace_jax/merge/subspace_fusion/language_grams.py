"""Gram matrices of the inputs of causal language models' kernels on text, written as folders."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from subspace_jax import data, interop, train
from subspace_jax.interop.writing import weights_writer
from subspace_jax.merge.subspace_fusion.folders import KernelGrams
from subspace_jax.merge.subspace_fusion.language_text import MergeText, rows_of_models
from subspace_jax.nn import CausalLMConfig
from subspace_jax.nn.models.causal_lm.kernel_grams import kernel_inputs
from subspace_jax.train.kernel_grams import gram_groups, grams_of_model, kernel_width

PyTree = Any


def write_grams(
    models: Sequence[str | os.PathLike], out: str | os.PathLike, texts: MergeText, *, progress: bool = False
) -> KernelGrams:
    """Measures the inputs of the kernels of each model's layers, and writes their Gram matrices in float32.

    One pass of the text for as many layers as 2 GiB of Gram matrices are of, sharded over all devices.  Padding does
    not count.

    Args:
      models: Hugging Face folders of causal language models of one family.
      out: Folder for the folders "0", "1" ...
      texts: The text.
      progress: Whether to show progress bars.

    Returns:
      The folders, for :func:`subspace_jax.merge.subspace_fusion.folders.merge_folders`.

    Raises:
      ValueError: See :func:`subspace_jax.merge.subspace_fusion.language_text.rows_of_models`; or an activation is not
        finite.
      OSError: A file can't be read or written.
    """
    mesh = train.make_mesh()
    rows = rows_of_models(models, texts, mesh)
    written = []
    for i, (folder, own) in enumerate(zip(models, rows, strict=True)):
        config, params = interop.load_causal_lm(
            folder, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
        )
        written.append(pathlib.Path(out) / str(i))
        written[-1].mkdir(parents=True)
        _write_model(written[-1], folder, (config, params), own, texts.batch_size, mesh, progress)
    return KernelGrams(tuple(written), outputs_first=config.family != "gpt2")


def _write_model(
    new: pathlib.Path,
    folder: str | os.PathLike,
    model: tuple[CausalLMConfig, PyTree],
    rows: dict[str, np.ndarray],
    batch_size: int,
    mesh: Mesh,
    progress: bool,
) -> None:
    """Writes the Gram matrices of one model, each under the names of the kernels that have these inputs."""
    config, params = model
    kernels: dict[tuple[int, str], list[str]] = {}
    stored = interop.open_folder(folder)
    for layer in range(config.num_layers):
        for path, source in kernel_inputs(config).items():
            name = f"{interop.kernel_place(config, layer, path)}.weight"
            # As in the first files of GPT-2.
            kernels.setdefault((layer, source), []).append(
                name if name in stored else name.removeprefix("transformer.")
            )
    shapes = {name: ((kernel_width(params, at),) * 2, np.dtype(np.float32)) for at in kernels for name in kernels[at]}
    total = -(-len(rows["inputs"]) // batch_size)
    with weights_writer(new, shapes) as put:
        for group in gram_groups(kernels, lambda at: [at], lambda at: kernel_width(params, at)):
            batches = data.eval_batches(rows, batch_size=batch_size)
            sums = grams_of_model(config, params, group, batches, mesh, total=total, progress=progress)
            for at, found in sums.items():
                for name in kernels[at]:
                    put(name, np.asarray(found.gram / found.count, np.float32))
