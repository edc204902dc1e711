"""Tables of labels on disk: a row for each example, a column for each concept."""

import csv
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_NAMES = ("factors", "labels")


class LabelTable(NamedTuple):
    """Labels of several concepts.

    Attributes:
      labels: ``[examples, concepts]`` int32: values that occur, numbered from 0.
      names: Names of the concepts.
      values: Names of each concept's values, in the order of their numbers.
    """

    labels: np.ndarray
    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    @property
    def n_values(self) -> tuple[int, ...]:
        """Number of values of each concept."""
        return tuple(map(len, self.values))


def read_label_table(path: str | os.PathLike) -> LabelTable:
    """Reads a table of labels.

    Args:
      path: A ``.csv`` file whose first line has the names of the concepts, with integers or texts; or integers
        ``[examples, concepts]`` in an ``.npy`` file, or as ``factors`` or ``labels`` of an ``.npz`` file.

    Returns:
      The table.  Integers are numbered in their order, texts alphabetically.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no such table, a number is negative, a cell is empty, or a concept has one value alone.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"labels: {path}: no such file")
    if path.suffix == ".csv":
        names, columns = _of_csv(path)
    elif path.suffix in (".npy", ".npz"):
        table = _of_arrays(path)
        names, columns = [f"concept {i}" for i in range(table.shape[1])], list(table.T)
    else:
        raise ValueError(f"labels: expected a file that ends in .csv, .npy or .npz, got {path}")
    return numbered(columns, names, f"labels: {path}")


def numbered(columns: Sequence[np.ndarray], names: Sequence[str], where: str = "labels") -> LabelTable:
    """Numbers the values of each column from 0.

    Args:
      columns: Integers or texts of each concept, ``[examples]``.
      names: Names of the concepts.
      where: How an error begins.

    Returns:
      The table.

    Raises:
      ValueError: A number is negative, or a concept has one value alone.
    """
    labels, values = [], []
    for name, column in zip(names, columns, strict=True):
        if np.issubdtype(column.dtype, np.integer) and column.min() < 0:
            row = int(np.argmax(column < 0))
            raise ValueError(f"{where}: column {name!r}, example {row}: expected 0 or more, got {column[row]}")
        found, own = np.unique(column, return_inverse=True)
        if len(found) < 2:
            raise ValueError(f"{where}: column {name!r}: expected 2 values or more, got {found[0]!s} alone")
        labels.append(own.astype(np.int32))
        values.append(tuple(map(str, found)))
    return LabelTable(np.stack(labels, axis=1), tuple(names), tuple(values))


def _of_csv(path: pathlib.Path) -> tuple[list[str], list[np.ndarray]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(number, line) for number, line in enumerate(csv.reader(file), start=1) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels: {path}: can't be read as CSV: {error}") from error
    if len(lines) < 2:
        raise ValueError(f"labels: {path}: expected a line of names and one for each example, got {len(lines)} lines")
    names = [name.strip() for name in lines[0][1]]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"labels: {path}: line {lines[0][0]}: expected a name for each column, got {names}")
    for number, line in lines[1:]:
        if len(line) != len(names):
            raise ValueError(f"labels: {path}: line {number}: expected {len(names)} cells, got {len(line)}")
        for name, cell in zip(names, line, strict=True):
            if not cell.strip():
                raise ValueError(f"labels: {path}: line {number}, column {name!r}: expected a value, got an empty cell")
    return names, [_column([line[i].strip() for _, line in lines[1:]]) for i in range(len(names))]


def _column(cells: list[str]) -> np.ndarray:
    """Integers where all cells are, texts otherwise."""
    try:
        return np.asarray([int(cell) for cell in cells], np.int64)
    except (ValueError, OverflowError):
        return np.asarray(cells)


def _of_arrays(path: pathlib.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if path.suffix == ".npz":
                there = [name for name in _NAMES if name in found.files]
                if not there:
                    names = ", ".join(found.files) or "none"
                    raise ValueError(f"expected an array {' or '.join(_NAMES)}, got {names}")
                found = found[there[0]]
    except Exception as error:  # a damaged file raises half a dozen kinds
        raise ValueError(f"labels: {path}: can't be read: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "iu":
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        raise ValueError(f"labels: {path}: expected integers [examples, concepts], got {kind}")
    return found
