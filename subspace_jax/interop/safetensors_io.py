"""The safetensors container: tensors read as slices of memory-mapped files, and written one by one.

Layout: eight bytes with the length of a header, the header in JSON, then the tensors' bytes.  Reading goes through
NumPy with the types of ``ml_dtypes``, for the usual package can't give bfloat16 as a NumPy array.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

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
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a file, of which nothing has been read.

    Attributes:
      file: The file.
      name: Name of the tensor.
      dtype: Its type.
      shape: Its shape.
      offset: Where its bytes begin in the file.
    """

    file: pathlib.Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Maps the tensor, and returns the part at ``index`` without a copy.

        Pages are read when they are looked at, and the mapping goes when the result does: whoever copies
        the part elsewhere and drops it holds one copy.

        Args:
          index: Slices, as many as there are axes or fewer.
        """
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)[index]
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)[index]


def read_header(file: str | os.PathLike) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Reads what a file holds.

    Args:
      file: A ``.safetensors`` file.

    Returns:
      Its tensors by name, and its metadata.

    Raises:
      ValueError: The file is no safetensors file, is cut off, or contradicts itself; the message names the file.
      FileNotFoundError: There is none.
    """
    file = pathlib.Path(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"{file}: not a safetensors file, or cut off: a header of {length} bytes in a file of {size}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: the header is not what a safetensors file has: {error}") from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < end:
            raise ValueError(f"{file}: {tensor.name!r} overlaps the tensor before it")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise ValueError(f"{file}: cut off: {tensor.name!r} ends at byte {end}, the file has {size}")
    return tensors, metadata


def _entry(file: pathlib.Path, name: str, entry: Mapping, start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has dtype {entry['dtype']!r}; expected one of {sorted(DTYPES)}")
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    tensor = StoredTensor(file, name, DTYPES[entry["dtype"]], shape, start + begin)
    if begin < 0 or any(n < 0 for n in shape) or end - begin != tensor.nbytes:
        raise ValueError(f"{name!r} has {end - begin} bytes, {tensor.nbytes} are expected of its shape {shape}")
    return tensor


def write_safetensors(
    file: str | os.PathLike,
    shapes: Mapping[str, tuple[Sequence[int], np.dtype]],
    tensors: Iterable[np.ndarray],
) -> None:
    """Writes tensors one after the other, so that only one of them has to be in memory.

    The file appears in full or not at all where the caller writes into a folder of its own; bytes are flushed to
    the disk.

    Args:
      file: Where to write.
      shapes: Name to shape and type, in the order of the file.
      tensors: The tensors in the same order.

    Raises:
      ValueError: A type has no name in this format, or a tensor is not as announced.
      OSError: The disk is full, say.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in shapes.items():
        if np.dtype(dtype) not in _NAMES:
            raise ValueError(f"{name}: type {np.dtype(dtype)} can't be stored; expected one of {sorted(DTYPES)}")
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.shape != tuple(shape) or tensor.dtype != np.dtype(dtype):
                raise ValueError(
                    f"{name}: expected {tuple(shape)} {np.dtype(dtype)}, got {tensor.shape} {tensor.dtype}"
                )
            stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def open_folder(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """Reads what a checkpoint folder holds: ``model.safetensors``, or the shards of its index.

    Args:
      folder: The folder.

    Returns:
      Its tensors by name.

    Raises:
      FileNotFoundError: There is no folder, no weights, or a shard is missing.
      ValueError: The weights are pickled, a file is damaged, or the index contradicts its shards.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return _open_shards(folder, index)
    if single.exists():
        return read_header(single)[0]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickled:
        raise ValueError(
            f"{folder}: has only pickled weights ({', '.join(pickled)}), which are refused because reading them may "
            "run any code; convert them to safetensors"
        )
    raise FileNotFoundError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")


def _open_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, StoredTensor]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map: {error}") from error
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f"{index}: a shard is a file beside the index, got {shard!r}")
        if not (folder / shard).exists():
            raise FileNotFoundError(f"{folder}: shard {shard!r} of the index is missing")
        shards[shard] = read_header(folder / shard)[0]
    if lost := sorted(name for name, shard in weight_map.items() if name not in shards[shard]):
        raise ValueError(f"{index}: tensors that their shards lack: {lost}")
    if extra := sorted(name for tensors in shards.values() for name in tensors if name not in weight_map):
        raise ValueError(f"{index}: tensors in the shards that the index does not name: {extra}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}
