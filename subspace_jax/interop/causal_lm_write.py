"""Causal language models to Hugging Face checkpoint folders, all or nothing."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interop.causal_lm import some, stored_shape
from subspace_jax.interop.hf_config import config_to_hf
from subspace_jax.interop.names import TensorName, tensor_names
from subspace_jax.interop.safetensors_io import write_safetensors
from subspace_jax.nn import CausalLM, CausalLMConfig, causal_lm_shapes, causal_lm_specs

PyTree = Any
Path = tuple[str, ...]

SHARD_BYTES = 5_000_000_000


def save_causal_lm(
    folder: str | os.PathLike,
    config: CausalLMConfig,
    params: PyTree,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder that :func:`load_causal_lm` and Hugging Face transformers read.

    One tensor at a time comes to the host.  The folder appears when all is written: whatever goes wrong before, a full
    disk among it, leaves an older folder as it was.  With several processes all call this; the first one writes.

    Args:
      folder: Where to write.
      config: The model.
      params: Its parameters, plain arrays, in the type in which they are to be stored.
      shard_bytes: Weights are split into files of at most this size (a larger tensor has its own).
      overwrite: Whether the folder may be there; its weights and config are replaced, its other files (a tokenizer)
        stay.

    Raises:
      FileExistsError: The folder is there and not empty, without ``overwrite``.
      ValueError: The parameters are not those of the config, or their type can't be stored.
      OSError: Writing failed.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists; pass overwrite=True to replace the checkpoint in it")
    tensors = tensor_names(config)
    leaves = _checked_leaves(config, params)
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    fields = config_to_hf(config, str(jnp.result_type(*dtypes)) if len(dtypes) == 1 else "float32")
    shapes = {t.name: (stored_shape(causal_lm_specs(config), t), leaves[t.place.path].dtype) for t in tensors}
    files = _split(shapes, shard_bytes)
    fetch = (_fetch(leaves[t.place.path], t) for t in tensors)
    if jax.process_index() != 0:
        # Bringing a tensor together takes all processes.
        for _ in fetch:
            pass
    else:
        with replacing(folder, _is_checkpoint_file) as new:
            (new / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            for file, names in files.items():
                write_safetensors(
                    new / file, {name: shapes[name] for name in names}, itertools.islice(fetch, len(names))
                )
            if len(files) > 1:
                index = {
                    "metadata": {"total_size": sum(_nbytes(*entry) for entry in shapes.values())},
                    "weight_map": {name: file for file, names in files.items() for name in names},
                }
                (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("save_causal_lm")


def save_pretrained(model: CausalLM, folder: str | os.PathLike, **options) -> None:
    """Writes a module as a checkpoint folder; options as of :func:`save_causal_lm`."""
    save_causal_lm(folder, model.config, model.params, **options)


def _checked_leaves(config: CausalLMConfig, params: PyTree) -> dict[Path, jax.Array]:
    def flat(tree: PyTree) -> dict[Path, Any]:
        return {tuple(_key(k) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    expected, got = flat(causal_lm_shapes(config)), flat(params)
    if expected.keys() != got.keys():
        missing, extra = (["/".join(p) for p in sorted(a)] for a in (expected - got.keys(), got - expected.keys()))
        raise ValueError(f"params: not those of the config; missing: {some(missing)}; unexpected: {some(extra)}")
    for path, leaf in got.items():
        if leaf.shape != expected[path].shape:
            raise ValueError(f"params: {'/'.join(path)}: expected {expected[path].shape}, got {leaf.shape}")
    return got


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def _fetch(leaf: jax.Array, tensor: TensorName) -> np.ndarray:
    # An array keeps its value on the host once that was asked for; a copy or a slice takes it along when it goes.
    part = jnp.copy(leaf) if tensor.place.layer is None else leaf[tensor.place.layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    part = np.asarray(part)
    return part.T if tensor.transposed else part


def _split(shapes: dict[str, tuple[tuple[int, ...], Any]], shard_bytes: int) -> dict[str, list[str]]:
    """Fills files in order, none beyond ``shard_bytes``."""
    groups, size = [[]], 0
    for name, entry in shapes.items():
        nbytes = _nbytes(*entry)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


@contextlib.contextmanager
def replacing(folder: pathlib.Path, is_ours: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Gives a folder to fill, which takes the place of ``folder`` if all goes well and is gone otherwise.

    Files of an older folder that are not ours, by their names, go over to the new one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    old = new.with_name(new.name.replace(".new-", ".old-"))
    try:
        new.chmod(0o755)
        yield new
        if folder.exists():
            for file in folder.iterdir():
                if not is_ours(file.name):
                    (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_checkpoint_file(name: str) -> bool:
    return name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
