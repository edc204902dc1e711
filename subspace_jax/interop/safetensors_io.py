"""The safetensors format: tensors read as slices of memory-mapped files, and written one at a time.

A file is eight bytes with the length of a header, the header in JSON, and the bytes of the tensors.  The package
``safetensors`` validates a file; tensors are read through memory maps of our own, as its slices are copies.
"""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from subspace_jax.data.json_object import read_json_object, unique_names
from subspace_jax.interop.config_fields import shown

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COMPARED_BYTES = 32 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
      file: The file.
      name: Name of the tensor.
      dtype: Its dtype.
      shape: Its shape.
      offset: Offset of its bytes in the file.
    """

    file: pathlib.Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Memory-maps the tensor, and returns the part at ``index`` without a copy.

        Pages are read on access, and the mapping is freed with the result.

        Args:
          index: Slices, at most one for each axis.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)[index]
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)[index]

    def equals(self, other: "StoredTensor") -> bool:
        """Whether two tensors have the same shape and values; some rows are compared at a time."""
        if self == other:
            return True
        if self.shape != other.shape or 0 in self.shape:
            return self.shape == other.shape
        length = self.shape[0] if self.shape else 1
        rows = max(1, _COMPARED_BYTES * length // max(self.nbytes, other.nbytes))
        for start in range(0, length, rows):
            index = (slice(start, start + rows),) if self.shape else ()
            one, two = np.asarray(self.read(index)), np.asarray(other.read(index))
            if self.dtype == other.dtype:
                # As bytes: a NaN equals itself.
                same = np.array_equal(np.atleast_1d(one).view(np.uint8), np.atleast_1d(two).view(np.uint8))
            else:
                same = np.array_equal(one.astype(np.float64), two.astype(np.float64))
            if not same:
                return False
        return True


def read_header(file: str | os.PathLike) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads the header of a file.

    Args:
      file: A ``.safetensors`` file.

    Returns:
      Its tensors by name, and its metadata.

    Raises:
      ValueError: The ``safetensors`` package refuses the file, a tensor is named twice, or one has a dtype that is not
        in :data:`DTYPES`.  The message names the file.
      OSError: The file can't be read.
    """
    file = pathlib.Path(file)
    with file.open("rb") as stream:
        try:
            with safe_open(file, framework="numpy") as opened:
                metadata = opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            # Its message may contain any text of the file.
            told = " ".join(str(error).split())[:300]
            raise ValueError(f"{file}: not a safetensors file, or cut off: {told}") from error
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_names)
        header.pop("__metadata__", None)
        return {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}, metadata
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _entry(file: pathlib.Path, name: str, entry: Mapping, start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{shown(name)} has dtype {entry['dtype']!r}; expected one of {sorted(DTYPES)}")
    return StoredTensor(file, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])


def write_safetensors(
    file: str | os.PathLike,
    shapes: Mapping[str, tuple[Sequence[int], np.dtype]],
    tensors: Iterable[np.ndarray],
) -> None:
    """Writes tensors one at a time, so that only one of them has to be in memory, and flushes them to disk.

    Args:
      file: File to write.
      shapes: Name to shape and dtype, in the order of the file.
      tensors: The tensors in the same order.

    Raises:
      ValueError: The format has no name for a dtype, or a tensor differs from ``shapes``.
      OSError: Writing failed.
    """
    with safetensors_writer(file, shapes) as put:
        for name, tensor in zip(shapes, tensors, strict=True):
            put(name, tensor)


@contextlib.contextmanager
def safetensors_writer(
    file: str | os.PathLike, shapes: Mapping[str, tuple[Sequence[int], np.dtype]]
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Yields a function that writes a tensor, in any order, so that several files can be written side by side.

    Args:
      file: See :func:`write_safetensors`, as for what is raised.
      shapes: Name to shape and dtype.

    Raises:
      ValueError: Also where a tensor has not been written in the end.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in shapes.items():
        if name == "__metadata__":
            raise ValueError(f"{name}: this name is the format's own; expected another one for a tensor")
        if np.dtype(dtype) not in _NAMES:
            raise ValueError(f"{name}: type {np.dtype(dtype)} can't be stored; expected one of {sorted(DTYPES)}")
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    left = set(shapes)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)

        def put(name: str, tensor: np.ndarray) -> None:
            shape, dtype = shapes[name]
            if tensor.shape != tuple(shape) or tensor.dtype != np.dtype(dtype):
                raise ValueError(
                    f"{name}: expected {tuple(shape)} {np.dtype(dtype)}, got {tensor.shape} {tensor.dtype}"
                )
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
            left.discard(name)

        yield put
        if left:
            raise ValueError(f"{file}: tensors that were not written: {some(sorted(left))}")
        stream.flush()
        os.fsync(stream.fileno())


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def has_weights(folder: str | os.PathLike) -> bool:
    """Whether a folder has weights that :func:`open_folder` reads."""
    return any((pathlib.Path(folder) / name).exists() for name in (_SINGLE, _INDEX))


def open_folder(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """Reads the headers of a checkpoint folder: of ``model.safetensors``, or else of the shards of its index.

    Args:
      folder: The folder.

    Returns:
      Its tensors by name.

    Raises:
      FileNotFoundError: The folder, its weights or a shard do not exist.
      ValueError: The weights are pickled, a file is damaged, or the index contradicts its shards.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    index, single = folder / _INDEX, folder / _SINGLE
    # As in transformers: an index beside a single file belongs to earlier weights.
    if single.is_file() or (single.exists() and not index.exists()):
        return read_header(single)[0]
    if index.exists():
        return _open_shards(folder, index)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickled:
        raise ValueError(
            f"{folder}: has only pickled weights ({', '.join(pickled[:8])}), which are refused because reading them "
            "may run any code; convert them to safetensors"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    raise FileNotFoundError(f"{folder}: has neither {_SINGLE} nor {_INDEX}{f', but {some(others)}' if others else ''}")


def check_same_tensors(
    flag: str,
    folder: str | os.PathLike,
    tensors: Mapping[str, StoredTensor],
    like: str | os.PathLike,
    expected: Mapping[str, StoredTensor],
) -> None:
    """Checks that two folders have tensors of the same names and shapes.

    Args:
      flag: Argument of the folder, for the message, as in ``"--base"``.
      folder: The folder.
      tensors: Its tensors.
      like: The folder that it is compared with.
      expected: The tensors of that one.

    Raises:
      ValueError: They differ; the message lists how.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{flag}: {folder}: expected the tensors of {like}; missing: {some(missing)}; unexpected: {some(extra)}"
        )
    wrong = [name for name, tensor in tensors.items() if tensor.shape != expected[name].shape]
    if wrong:
        told = [
            f"{name}: expected shape {expected[name].shape} as in {like}, got {tensors[name].shape}"
            for name in wrong[:8]
        ]
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{flag}: {folder}: {'; '.join(told)}{more}")


def _open_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, StoredTensor]:
    weight_map = read_json_object(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: expected JSON with a weight_map, an object, got {shown(weight_map)}")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]{1,200}\.safetensors", shard):
            raise ValueError(f"{index}: a shard is a .safetensors file beside the index, got {shown(shard)}")
        if shard not in shards:
            if not (folder / shard).exists():
                raise FileNotFoundError(f"{folder}: shard {shard!r} of the index is missing")
            shards[shard] = read_header(folder / shard)[0]
    if lost := sorted(name for name, shard in weight_map.items() if name not in shards[shard]):
        raise ValueError(f"{index}: tensors that their shards lack: {some(lost)}")
    if extra := sorted({name for tensors in shards.values() for name in tensors if name not in weight_map}):
        raise ValueError(f"{index}: tensors in the shards that the index does not name: {some(extra)}")
    if sum(map(len, shards.values())) > len(weight_map):
        twice = sorted(name for shard, tensors in shards.items() for name in tensors if weight_map[name] != shard)
        raise ValueError(f"{index}: tensors that stand in more than one shard: {some(twice)}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def some(names: list[str]) -> str:
    """Formats the first names of a list."""
    return f"{names[:8]}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else "none"
