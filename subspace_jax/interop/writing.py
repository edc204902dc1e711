"""Checkpoint folders, written all or nothing."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interop.safetensors_io import safetensors_writer, some, write_safetensors
from subspace_jax.interop.tensors import Path, PyTree, TensorLayout, TensorName, stored_shape, to_stored
from subspace_jax.nn.params import spec_shapes

SHARD_BYTES = 5_000_000_000


def write_checkpoint(
    folder: str | os.PathLike,
    fields: Callable[[str], dict[str, Any]],
    layout: TensorLayout,
    params: PyTree,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    side_files: Mapping[str, pathlib.Path | str] | None = None,
) -> None:
    """Writes the checkpoint folder of any model.

    ``fields`` returns the fields of ``config.json`` for the name of the weights' dtype.  The tensors of ``layout`` are
    in the order of the files; the parts of one are adjacent and in order.  Other arguments: see
    :func:`subspace_jax.interop.save_causal_lm`.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists; pass overwrite=True to replace the checkpoint in it")
    leaves = _checked_leaves(layout.specs, params)
    dtypes = {str(leaf.dtype) for leaf in leaves.values()}
    made = fields(str(jnp.result_type(*dtypes)) if len(dtypes) == 1 else "float32")
    shapes = {t.name: (stored_shape(layout.specs, t), leaves[t.place.path].dtype) for t in layout.tensors}
    together = itertools.groupby(layout.tensors, lambda t: t.name)
    fetch = (_fetch(leaves, list(parts)) for _, parts in together)
    if jax.process_index() != 0:
        # All processes take part in gathering a tensor.
        for _ in fetch:
            pass
    else:
        with replacing(folder, is_checkpoint_file) as new:
            write_side_files(new, side_files or {})
            (new / "config.json").write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")
            write_weights(new, shapes, fetch, shard_bytes)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("write_checkpoint")


def write_weights(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
    tensors: Iterator[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the weights of a folder, one tensor at a time, in several files with their index where one is too large.

    Args:
      folder: The folder, which is there.
      shapes: Name to shape and dtype.
      tensors: The tensors in the same order.
      shard_bytes: Largest size of a file; a larger tensor has a file of its own.
    """
    files = _split(shapes, shard_bytes)
    for file, names in files.items():
        write_safetensors(folder / file, {name: shapes[name] for name in names}, itertools.islice(tensors, len(names)))
    _write_index(folder, shapes, files)


@contextlib.contextmanager
def weights_writer(
    folder: pathlib.Path, shapes: Mapping[str, tuple[tuple[int, ...], Any]], shard_bytes: int = SHARD_BYTES
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Yields a function that writes a tensor of a folder, so that several folders can be written side by side.

    Args:
      folder: See :func:`write_weights`, as for the other arguments.
      shapes: Name to shape and dtype.
      shard_bytes: Largest size of a file.

    Raises:
      ValueError: A tensor differs from ``shapes``, or has not been written in the end.
      OSError: Writing failed.
    """
    files, puts = _split(shapes, shard_bytes), {}
    with contextlib.ExitStack() as stack:
        for file, names in files.items():
            put = stack.enter_context(safetensors_writer(folder / file, {name: shapes[name] for name in names}))
            puts |= dict.fromkeys(names, put)
        yield lambda name, tensor: puts[name](name, tensor)
    _write_index(folder, shapes, files)


def _write_index(folder: pathlib.Path, shapes: Mapping[str, Any], files: Mapping[str, list[str]]) -> None:
    """Writes the index of several files."""
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(_nbytes(*entry) for entry in shapes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_side_files(folder: str | os.PathLike, files: Mapping[str, pathlib.Path | str]) -> None:
    """Copies files into a folder, or writes their texts; see :func:`subspace_jax.interop.side_files`."""
    for name, source in files.items():
        file = pathlib.Path(folder) / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(source, str):
            file.write_text(source, encoding="utf-8")
        else:
            shutil.copyfile(source, file)


def _checked_leaves(specs: PyTree, params: PyTree) -> dict[Path, jax.Array]:
    def flat(tree: PyTree) -> dict[Path, Any]:
        return {tuple(_key(k) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    expected, got = flat(spec_shapes(specs)), flat(params)
    if expected.keys() != got.keys():
        missing, extra = (["/".join(p) for p in sorted(a)] for a in (expected - got.keys(), got - expected.keys()))
        raise ValueError(f"params: not those of the config; missing: {some(missing)}; unexpected: {some(extra)}")
    for path, leaf in got.items():
        if leaf.shape != expected[path].shape:
            raise ValueError(f"params: {'/'.join(path)}: expected {expected[path].shape}, got {leaf.shape}")
    return got


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def _fetch(leaves: Mapping[Path, jax.Array], parts: list[TensorName]) -> np.ndarray:
    fetched = [to_stored(part, _to_host(leaves[part.place.path], part.place.layer)) for part in parts]
    return fetched[0] if len(fetched) == 1 else np.concatenate(fetched)


def _to_host(leaf: jax.Array, layer: int | None) -> np.ndarray:
    # An array caches its value on the host once it is read; a copy or a slice frees it.
    part = jnp.copy(leaf) if layer is None else leaf[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def _split(shapes: Mapping[str, tuple[tuple[int, ...], Any]], shard_bytes: int) -> dict[str, list[str]]:
    """Distributes tensors over files in order, none beyond ``shard_bytes``."""
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
    """Yields a new folder, which replaces ``folder`` on success and is deleted otherwise.

    Files of the old folder are moved to the new one, except those for whose name ``is_ours`` is true and those that it
    has already.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    old = new.with_name(new.name.replace(".new-", ".old-"))
    try:
        new.chmod(0o755)
        yield new
        if folder.exists():
            for file in folder.iterdir():
                if not is_ours(file.name) and not (new / file.name).exists():
                    (shutil.copytree if file.is_dir() else shutil.copy2)(file, new / file.name)
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # which name no file
            raise OSError(error.errno, f"can't write {folder} ({error.strerror})") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name in a folder is of its checkpoint, which another one replaces."""
    return name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
