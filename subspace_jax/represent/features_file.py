"""Reading and writing ``.npz`` files of features."""

import difflib
import math
import os
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np

from subspace_jax import train
from subspace_jax.represent.labels import count_classes

# Arrays above this size are refused where they are compressed by more than the ratio.
_UNCHECKED_BYTES = 2**28
_LARGEST_RATIO = 100


class Features(NamedTuple):
    """Features of a labelled set.

    Attributes:
      features: ``[examples, n]`` float32.
      labels: ``[examples]`` int32.
      class_names: Names of the classes, by label.
    """

    features: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def save_features(path: str | os.PathLike, found: Features, **notes: str) -> None:
    """Writes features to an ``.npz`` file, atomically.

    Args:
      path: Path of the file.
      found: Features to write.
      **notes: Further texts to store, such as the model's name.

    Raises:
      ValueError: The path does not end in ``.npz``.
      OSError: The file can't be written.
    """
    path = check_features_path(path)
    with train.replacing(path) as partial:
        np.savez(partial, **found._replace(class_names=np.array(found.class_names, dtype=str))._asdict(), **notes)


def check_features_path(path: str | os.PathLike) -> pathlib.Path:
    """Checks that :func:`save_features` can write to a path, and creates its folder.

    Raises:
      ValueError: The path does not end in ``.npz``, or is a folder.
      OSError: The folder is not writable.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if path.suffix != ".npz" or path.is_dir():
        raise ValueError(f"features: expected the path of a file that ends in .npz, got {path}")
    train.writable_folder(path.parent)
    return path


def read_features(path: str | os.PathLike) -> Features:
    """Reads an ``.npz`` file with ``features``, ``labels`` and, optionally, ``class_names``.

    Types, shapes and sizes are checked before an array is read; pickled objects are never loaded.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is damaged or lacks a field, features are not finite numbers ``[examples, n]``, or labels are
        not integers ``[examples]`` from 0 and below the number of ``class_names``.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.npz")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise FileNotFoundError(f"features: {path}: no such file{hint}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except _FieldError as error:
        raise ValueError(f"features: {path}: {error}") from error
    except Exception as error:  # a damaged archive raises half a dozen kinds
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"features: {path}: can't be read as .npz: {why}") from error


class _FieldError(ValueError):
    pass


def _read(archive: zipfile.ZipFile) -> Features:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if len(set(names)) < len(names):
        raise _FieldError(f"has duplicate fields: {sorted(names)}")
    if missing := {"features", "labels"} - set(names):
        raise _FieldError(f"lacks {sorted(missing)}, has {sorted(names)}")
    shapes = {name: _header(archive, name) for name in ("features", "labels", "class_names") if name in names}
    (rows, dtype), (examples, label_type) = shapes["features"], shapes["labels"]
    if len(rows) != 2 or 0 in rows or dtype.kind not in "fiu":
        raise _FieldError(f"expected numbers [examples, n] as features, got {dtype} {list(rows)}")
    if examples != rows[:1] or label_type.kind not in "iu":
        raise _FieldError(f"expected integers [{rows[0]}] as labels, got {label_type} {list(examples)}")
    named = shapes.get("class_names")
    if named is not None and (len(named[0]) != 1 or named[1].kind not in "USiu"):
        raise _FieldError(f"expected texts [classes] as class_names, got {named[1]} {list(named[0])}")
    labels = _array(archive, "labels")
    try:
        num_classes = count_classes(labels, None if named is None else named[0][0])
    except ValueError as error:
        raise _FieldError(str(error)) from error
    with np.errstate(over="ignore"):
        features = _array(archive, "features").astype(np.float32)
    if not np.isfinite(features).all():
        raise _FieldError("expected finite features in the range of float32, got NaN, infinity or larger values")
    texts = range(num_classes) if named is None else _array(archive, "class_names").tolist()
    decoded = (text.decode() if isinstance(text, bytes) else str(text) for text in texts)
    return Features(features, labels.astype(np.int32), tuple(decoded))


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Reads the shape and type of an array, and checks them against its number of bytes."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(file)](file)
        left = info.file_size - file.tell()
    if dtype.hasobject:
        raise _FieldError(f"{name} holds pickled objects, which are not loaded")
    if not dtype.itemsize or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
        raise _FieldError(f"{name} is declared as {dtype} {list(shape)}, but has {left} bytes")
    if left > max(_UNCHECKED_BYTES, _LARGEST_RATIO * info.compress_size):
        raise _FieldError(f"{name} would take {left} bytes, compressed to {info.compress_size}")
    return shape, dtype


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
