"""The GGUF format: header of a file, every count, length, type and offset checked before it is used.

A file is the magic ``GGUF``, a version, the numbers of tensors and of metadata entries, the metadata, the names and
places of the tensors, and their bytes from the next multiple of ``general.alignment`` on.
"""

import itertools
import math
import mmap
import os
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from subspace_jax.interop.config_fields import naming, shown
from subspace_jax.interop.gguf.blocks import BLOCK_TYPES, BlockType
from subspace_jax.interop.gguf.tensors import BlockTensor

_MAGIC = b"GGUF"
_LENGTH = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
# Of the format, or beyond any file: names are short, and no tensor has more axes.
_MAX_KEY, _MAX_NAME, _MAX_AXES, _MAX_ALIGNMENT, _MAX_HEADER = 65_535, 512, 4, 2**20, 2**28
# Least bytes of a metadata entry (name, type, a byte) and of a tensor's (name, axes, one size, type, offset).
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


class Header(NamedTuple):
    """The header of a GGUF file.

    Attributes:
      version: Version of the format, 2 or 3.
      metadata: Values by name; arrays are lists of strings, or NumPy arrays.
      tensors: Tensors by name, in the order of the file.
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, BlockTensor]


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is a file that ends in ``.gguf``, or begins as GGUF files do."""
    path = pathlib.Path(path)
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def read_header(path: str | os.PathLike) -> Header:
    """Reads the header of a GGUF file, of version 2 or 3, little-endian and of at most 256 MiB.

    The file is memory-mapped; memory is needed for the metadata alone, in proportion to their bytes in the file.

    Args:
      path: The file.

    Returns:
      Its metadata, and its tensors, not read yet.

    Raises:
      ValueError: The file is damaged or truncated: a count, length, type, size, alignment or offset can't be true, a
        name stands twice, or tensors overlap.  Or a tensor has a type that is not supported; those in
        :data:`BLOCK_TYPES` are.  The message names the file.
      OSError: The file can't be read.
    """
    path = pathlib.Path(path)
    with path.open("rb") as stream, naming(path):
        if os.fstat(stream.fileno()).st_size < 24:
            raise ValueError("not a GGUF file, or cut off in its first 24 bytes")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read(path, _Cursor(mapped))


class _Cursor:
    """Reads a header from its start on; raises ValueError beyond the end of the file, or of the largest header."""

    def __init__(self, mapped: mmap.mmap):
        self._mapped, self.at, self.size = mapped, 0, min(len(mapped), _MAX_HEADER)

    def take(self, nbytes: int, what: str) -> bytes:
        self.check(nbytes, 1, what)
        self.at += nbytes
        return self._mapped[self.at - nbytes : self.at]

    def check(self, count: int, nbytes: int, what: str) -> None:
        """Raises unless ``count`` entries of at least ``nbytes`` bytes each can follow."""
        if count * nbytes > self.size - self.at:
            of = f" of the {_MAX_HEADER} of a header" if self.size == _MAX_HEADER else ""
            raise ValueError(
                f"{what}: at byte {self.at} the header says {count} of at least {nbytes} bytes each, the file has "
                f"{self.size - self.at} left{of}; it is damaged or cut off"
            )

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.check(1, size, what)
        (value,) = struct.unpack_from("<" + code, self._mapped, self.at)
        self.at += size
        return value

    def string(self, what: str, most: int | None = None) -> str:
        # In few calls: a vocabulary has hundreds of thousands of strings.
        self.check(1, _LENGTH.size, what)
        (length,) = _LENGTH.unpack_from(self._mapped, self.at)
        if most is not None and length > most:
            raise ValueError(f"{what}: at byte {self.at} its length is {length}; expected at most {most}")
        self.at += _LENGTH.size
        self.check(length, 1, what)
        start, self.at = self.at, self.at + length
        try:
            return self._mapped[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what}: at byte {start}: expected UTF-8 ({error.reason})") from error


def _read(path: pathlib.Path, cursor: _Cursor) -> Header:
    magic = cursor.take(4, "magic")
    if magic != _MAGIC:
        raise ValueError(f"not a GGUF file: it begins with {magic!r}")
    version = cursor.scalar("I", "version")
    if version not in (2, 3):
        kind = "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise ValueError(f"{kind} of GGUF is not supported; expected version 2 or 3, little-endian")
    num_tensors, num_entries = cursor.scalar("Q", "number of tensors"), cursor.scalar("Q", "number of entries")
    cursor.check(num_tensors, _LEAST_TENSOR, "tensors")
    cursor.check(num_entries, _LEAST_ENTRY, "metadata")
    metadata: dict[str, Any] = {}
    for number in range(num_entries):
        name = cursor.string(f"name of entry {number}", _MAX_KEY)
        if name in metadata:
            raise ValueError(f"the metadata entry {shown(name)} stands twice")
        metadata[name] = _value(cursor, cursor.scalar("I", shown(name)), shown(name))
    places = [_place(cursor, number) for number in range(num_tensors)]
    alignment = _alignment(metadata)
    start = -(-cursor.at // alignment) * alignment
    return Header(version, metadata, _tensors(path, places, start, path.stat().st_size, alignment))


def _value(cursor: _Cursor, kind: int, name: str) -> Any:
    if kind == _STRING:
        return cursor.string(name)
    if kind == _ARRAY:
        return _array(cursor, name)
    if kind not in _SCALARS:
        raise ValueError(f"{name}: type {kind} is none of the format's")
    value = cursor.scalar(_SCALARS[kind], name)
    if kind == _BOOL:
        return _booleans(np.array([value]), name)[0].item()
    # 1e-5 rather than 9.999999747378752e-06: the shortest decimal of the same float32.
    return float(str(np.float32(value))) if kind == 6 else value


def _array(cursor: _Cursor, name: str) -> list[str] | np.ndarray:
    kind, count = cursor.scalar("I", name), cursor.scalar("Q", name)
    if kind == _STRING:
        cursor.check(count, _LENGTH.size, name)
        return [cursor.string(name) for _ in range(count)]
    if kind not in _SCALARS:
        raise ValueError(f"{name}: expected an array of numbers or strings, got elements of type {kind}")
    dtype = np.dtype("<" + _SCALARS[kind])
    cursor.check(count, dtype.itemsize, name)
    array = np.frombuffer(cursor.take(count * dtype.itemsize, name), dtype)
    return _booleans(array, name) if kind == _BOOL else array


def _booleans(values: np.ndarray, name: str) -> np.ndarray:
    if np.any(values > 1):
        raise ValueError(f"{name}: expected booleans, 0 or 1, got {values.max()}")
    return values.astype(bool)


class _Place(NamedTuple):
    name: str
    shape: tuple[int, ...]
    block: BlockType
    offset: int
    nbytes: int


def _place(cursor: _Cursor, number: int) -> _Place:
    name = cursor.string(f"name of tensor {number}", _MAX_NAME)
    label = shown(name)
    axes = cursor.scalar("I", label)
    if not 1 <= axes <= _MAX_AXES:
        raise ValueError(f"{label}: expected 1 to {_MAX_AXES} axes, got {axes}")
    shape = tuple(cursor.scalar("Q", label) for _ in range(axes))[::-1]
    kind, offset = cursor.scalar("I", label), cursor.scalar("Q", label)
    if kind not in BLOCK_TYPES:
        known = ", ".join(block.name for block in BLOCK_TYPES.values())
        raise ValueError(f"{label}: type {kind} of ggml is not supported; expected one of {known}")
    block = BLOCK_TYPES[kind]
    if 0 in shape or shape[-1] % block.size:
        raise ValueError(f"{label}: expected rows of whole blocks of {block.size} {block.name} numbers, got {shape}")
    return _Place(name, shape, block, offset, math.prod(shape) // block.size * block.nbytes)


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    known = isinstance(alignment, int) and not isinstance(alignment, bool) and 8 <= alignment <= _MAX_ALIGNMENT
    if not known or alignment & (alignment - 1):
        raise ValueError(
            f"general.alignment: expected a power of two from 8 to {_MAX_ALIGNMENT}, got {shown(alignment)}"
        )
    return alignment


def _tensors(path: pathlib.Path, places: list[_Place], start: int, size: int, alignment: int) -> dict[str, BlockTensor]:
    tensors: dict[str, BlockTensor] = {}
    for name, shape, block, offset, nbytes in places:
        if name in tensors:
            raise ValueError(f"the tensor {shown(name)} stands twice")
        if offset % alignment:
            raise ValueError(f"{shown(name)}: expected an offset that is a multiple of {alignment}, got {offset}")
        if start + offset + nbytes > size:
            raise ValueError(
                f"{shown(name)}: {shape} of {block.name} takes {nbytes} bytes from byte {start + offset} on, the file "
                f"has {size}; it is damaged or cut off"
            )
        tensors[name] = BlockTensor(path, name, block.dtype, shape, start + offset, block)
    for before, after in itertools.pairwise(sorted(places, key=lambda place: place.offset)):
        if before.offset + before.nbytes > after.offset:
            raise ValueError(f"the tensors {shown(before.name)} and {shown(after.name)} overlap")
    return tensors
