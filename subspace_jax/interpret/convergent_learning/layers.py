"""Features of several layers in one file, and the comparison of all layers of two networks."""

import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from subspace_jax.interpret.convergent_learning.compare import (
    FAST_MEASURES,
    MEASURES,
    Score,
    check_features,
    compare_prepared,
    prepared,
)
from subspace_jax.interpret.convergent_learning.scores import Side

# Arrays of a file of features that are none.
_OTHERS = ("labels", "class_names")
_ROWS = 4096
# Most that is kept of layers, which are compared with several others.
_KEPT_BYTES = 2**30


class LayerComparison(NamedTuple):
    """Scores of all pairs of layers.

    Attributes:
      rows: Layers of the first network.
      columns: Layers of the second.
      scores: Scores by measure, of each pair ``(row, column)``.
      constant: Constant units by layer, as ``("x" or "y", layer)``, where there are any.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    scores: dict[tuple[str, str], dict[str, Score]]
    constant: dict[tuple[str, str], int]

    def matrix(self, measure: str, field: str = "calibrated") -> np.ndarray:
        """A field of the scores of a measure, ``[rows, columns]``."""
        return np.array([[getattr(self.scores[r, c][measure], field) for c in self.columns] for r in self.rows])


def read_layers(path: str | os.PathLike, layers: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads features of one or more layers.

    Args:
      path: An ``.npy`` file, which is memory-mapped, or an ``.npz`` file whose matrices are layers, by name.
      layers: Names of the layers to read; all in the order of the file by default.

    Returns:
      Features ``[n, p]`` by layer; the name of the file for ``.npy``.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no file of features, layers differ in their numbers of examples, or one that is asked for is
        not there.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: expected a file that ends in .npy or .npz, or a model's folder")
    try:
        if path.suffix == ".npy":
            _check_magic(path)
            found = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files if _is_layer(name, archive)}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: can't be read as {path.suffix}: {error}") from error
    if not found:
        raise ValueError(f"{path}: expected matrices of features [n, p], got none")
    if missing := [name for name in layers if name not in found]:
        raise ValueError(f"{path}: expected some of the layers {', '.join(found)}, got {missing[0]!r}")
    found = {name: found[name] for name in layers} if layers else found
    try:
        counts = {name: len(check_features(f"{path}: {name}", x)) for name, x in found.items()}
    except TypeError as error:  # it is the file that is wrong
        raise ValueError(str(error)) from error
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: expected layers of the same examples, got {counts}")
    return found


def _check_magic(path: pathlib.Path) -> None:
    """Refuses what is no NumPy file before NumPy takes it for a pickle."""
    with path.open("rb") as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("it is not in the format of numpy.save")


def _is_layer(name: str, archive) -> bool:
    return name not in _OTHERS and archive[name].dtype.kind not in "USO" and archive[name].ndim == 2


def compare_layers(
    x: Mapping[str, np.ndarray],
    y: Mapping[str, np.ndarray],
    *,
    measures: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> LayerComparison:
    """Compares each layer of a network with each of another.

    Args:
      x: Features ``[n, p]`` by layer.
      y: Features of the same examples by layer, of other widths.
      measures: See :func:`compare`; by default all for a single pair of layers, and those without a decomposition of
        each shuffle for several.
      progress: See :func:`compare`; called for all pairs.
      **settings: See :func:`compare`.

    Raises:
      ValueError: See :func:`compare`; the message names the layers.
    """
    single = len(x) == len(y) == 1
    measures = (MEASURES if single else FAST_MEASURES) if measures is None else measures
    found, prepare = {}, _keeping()
    for row, a in x.items():
        for column, b in y.items():
            try:
                found[row, column] = compare_prepared(a, b, prepare, measures=measures, progress=progress, **settings)
            except ValueError as error:
                raise ValueError(f"{row} and {column}: {error}") from error
    constant = {}
    for side, layers in (("x", x), ("y", y)):
        for name, features in layers.items():
            if count := _constant_units(features):
                constant[side, name] = count
    return LayerComparison(tuple(x), tuple(y), found, constant)


def _keeping() -> Callable[..., Side]:
    """Prepares a side as :func:`prepared`, once for all pairs of a layer, as far as memory is meant to hold them."""
    sides: dict[tuple[str, int], Side] = {}

    def prepare(name, x, *settings):
        if (key := (name, id(x))) in sides:
            return sides[key]
        side = prepared(name, x, *settings)
        if sum(a.nbytes for a in jax.tree.leaves((side, *sides.values()))) <= _KEPT_BYTES:
            sides[key] = side
        return side

    return prepare


def _constant_units(x: np.ndarray) -> int:
    """Returns the number of columns whose entries are all equal, read in blocks."""
    constant = np.ones(x.shape[1], bool)
    for start in range(0, len(x), _ROWS):
        constant &= (np.asarray(x[start : start + _ROWS]) == x[0]).all(axis=0)
    return int(constant.sum())
