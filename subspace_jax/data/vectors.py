"""Vectors on disk: read and mapped in blocks, so that a store of any size takes the memory of one block."""

import contextlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np

NAMES = ("features", "vectors", "embeddings")
BLOCK_BYTES = 2**25
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class StoredVectors(NamedTuple):
    """A matrix in a file, not read yet.

    Attributes:
      name: Name of the argument that the file came by, for messages.
      path: The file.
      member: Name of the array in an ``.npz`` file; empty for an ``.npy`` file.
      shape: Vectors and width.
      dtype: float16, float32 or float64.
    """

    name: str
    path: pathlib.Path
    member: str
    shape: tuple[int, int]
    dtype: np.dtype

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Reads the vectors in order, ``[rows, n]`` float32 at a time and fewer at the end.

        Raises:
          ValueError: A vector holds NaN or infinity, or the file is cut off.
        """
        with _opened(self.path, self.member) as file:
            _header(file)
            for start in range(0, self.shape[0], rows):
                shape = min(rows, self.shape[0] - start), self.shape[1]
                read = file.read(shape[0] * shape[1] * self.dtype.itemsize)
                try:
                    block = np.frombuffer(read, self.dtype).reshape(shape)
                except ValueError as error:
                    raise ValueError(f"{self.name}: {self.path}: cut off after vector {start}") from error
                with np.errstate(over="ignore"):
                    block = block.astype(np.float32)
                check_finite(f"{self.name}: {self.path}", block, start)
                yield block

    def read(self) -> np.ndarray:
        """Reads all vectors, ``[vectors, n]`` float32; raises as :meth:`blocks`."""
        return next(self.blocks(self.shape[0]))


def open_vectors(name: str, path: str | os.PathLike) -> StoredVectors:
    """Opens a matrix of vectors, one of an item in each row.

    Args:
      name: Name of the argument, for messages.
      path: An ``.npy`` file, or an ``.npz`` file with one of :data:`NAMES`, such as ``subspace-jax features`` writes.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It holds no matrix of floating-point numbers.
    """
    path = pathlib.Path(path).expanduser()
    member = _member(name, path, NAMES)
    with _opened(path, member) as file:
        shape, by_columns, dtype = _described(name, path, file)
    if len(shape) != 2 or 0 in shape or dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"{name}: {path}: expected floating-point vectors [items, n], got {dtype} {list(shape)}")
    if by_columns and 1 not in shape:
        raise ValueError(f"{name}: {path}: is stored by columns; write numpy.ascontiguousarray(...) of it")
    return StoredVectors(name, path, member, shape, dtype)


def read_labels(path: str | os.PathLike, count: int) -> np.ndarray:
    """Reads the labels of vectors: integers or texts, in an ``.npy`` file or as ``labels`` of an ``.npz`` file.

    Args:
      path: The file.
      count: How many there have to be.

    Returns:
      ``[count]`` int32, the classes numbered from 0 in their sorted order.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: There are no labels in it, another number of them, or those of one class alone.
    """
    path = pathlib.Path(path).expanduser()
    member = _member("labels", path, ("labels",))
    with _opened(path, member) as file:
        shape, _, dtype = _described("labels", path, file)
        if len(shape) != 1 or dtype.kind not in "iuUS":
            raise ValueError(f"labels: {path}: expected integers or texts [vectors], got {dtype} {list(shape)}")
        if shape[0] != count:
            raise ValueError(f"labels: {path}: expected one for each of {count} vectors, got {shape[0]}")
        found = np.frombuffer(file.read(), dtype)
    classes, labels = np.unique(found, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels: {path}: expected two classes or more, got {classes[0]} alone; leave --labels out")
    return labels.astype(np.int32)


def check_finite(name: str, vectors: np.ndarray, start: int = 0) -> None:
    """Raises ValueError where a vector holds NaN or infinity, with the numbers of the first ones."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{name}: expected finite vectors, got NaN or infinity in {len(wrong)}: vector {_some(start + wrong)}"
        )


def check_informative(name: str, vectors: np.ndarray, metric: str) -> None:
    """Raises ValueError where vectors can't be told apart: a width of 1, one vector for all, or no direction.

    Args:
      name: What to call them.
      vectors: ``[vectors, n]``.
      metric: "cosine", for which a vector of zeros has no direction, or "l2".
    """
    if vectors.shape[1] < 2:
        raise ValueError(f"{name}: expected vectors of width 2 or more, got width {vectors.shape[1]}")
    if len(vectors) > 1 and np.all(vectors == vectors[:1]):
        raise ValueError(f"{name}: expected vectors that differ, got {len(vectors)} times that of vector 0")
    zero = np.flatnonzero(~vectors.any(axis=1))
    if metric == "cosine" and len(zero):
        raise ValueError(
            f"{name}: expected vectors with a direction, got zeros alone in {len(zero)}: vector {_some(zero)}"
        )


def map_blocks(
    source: StoredVectors, file: IO[bytes], width: int, apply: Callable[[np.ndarray], tuple], *, progress: bool
) -> np.ndarray:
    """Writes mapped vectors as ``.npy``, block by block, in the dtype of the source.

    Args:
      source: The vectors.
      file: Takes the bytes.
      width: Width of mapped vectors.
      apply: Maps a block ``[rows, n]`` to vectors ``[rows, width]`` and scores ``[rows]``; all blocks have one shape.
      progress: Whether to show a progress bar.

    Returns:
      The scores, ``[vectors]`` float32.

    Raises:
      ValueError: A vector holds NaN or infinity, or the source is cut off.
      OSError: The file can't be written.
    """
    from tqdm.auto import tqdm

    count = source.shape[0]
    rows = min(count, max(1, BLOCK_BYTES // (4 * max(width, source.shape[1]))))
    scores = np.empty(count, np.float32)
    fields = {"descr": source.dtype.str, "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_2_0(file, fields)
    start = 0
    with tqdm(total=count, unit="vector", unit_scale=True, disable=None if progress else True) as bar:
        for block in source.blocks(rows):
            padding = rows - len(block)
            mapped, score = apply(np.pad(block, ((0, padding), (0, 0))) if padding else block)
            stop = start + len(block)
            scores[start:stop] = score[: len(block)]
            file.write(np.ascontiguousarray(mapped[: len(block)], source.dtype).data)
            bar.update(len(block))
            start = stop
    return scores


def _some(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:5])) + ", ..." * (len(numbers) > 5)


def _member(name: str, path: pathlib.Path, names: tuple[str, ...]) -> str:
    """Returns the name of the array in an .npz file, the first of ``names`` that is there."""
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {path}: no such file")
    if path.suffix == ".npy":
        return ""
    if path.suffix != ".npz":
        raise ValueError(f"{name}: expected a file that ends in .npy or .npz, got {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            there = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name}: {path}: can't be read as .npz: {error}") from error
    for candidate in names:
        if f"{candidate}.npy" in there:
            return f"{candidate}.npy"
    found = ", ".join(member.removesuffix(".npy") for member in there)
    raise ValueError(f"{name}: {path}: expected an array {' or '.join(names)}, got {found or 'none'}")


@contextlib.contextmanager
def _opened(path: pathlib.Path, member: str) -> Iterator[IO[bytes]]:
    if not member:
        with path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file


def _described(name: str, path: pathlib.Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        return _header(file)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: {path}: can't be read as an array: {error}") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    return _HEADERS[np.lib.format.read_magic(file)](file)
