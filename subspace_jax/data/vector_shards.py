"""Vectors in ``.npy`` files of any size as a source of examples: memory-mapped, and read by index."""

import bisect
import os
import pathlib
from collections.abc import Sequence

import numpy as np


class VectorShards:
    """The rows of one or more ``.npy`` files in the order of their names, as examples ``{"inputs": [n] float32}``.

    Files are memory-mapped: a batch costs the pages of its rows.

    Args:
      path: An ``.npy`` file, or a folder of them.
      name: Name of the argument, for messages.
      start: First vector.
      stop: The one after the last; all by default.

    Raises:
      FileNotFoundError: There is no such file, or none in the folder.
      ValueError: A file holds no matrix of floating-point numbers, or widths differ.
    """

    def __init__(self, path: str | os.PathLike, *, name: str = "data", start: int = 0, stop: int | None = None):
        path = pathlib.Path(path).expanduser()
        files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"{name}: no {'.npy file in' if path.is_dir() else 'file'} {path}")
        self.name, self._files, self._arrays, self._ends = name, files, [], []
        for file in files:
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(f"{name}: {file}: no .npy file of numbers, or cut off ({error})") from error
            if not isinstance(array, np.ndarray) or array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
                got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
                raise ValueError(f"{name}: {file}: expected floating-point vectors [items, n], got {got}")
            if self._arrays and array.shape[1] != self.width:
                raise ValueError(f"{name}: {file}: expected vectors of width {self.width}, got {array.shape[1]}")
            self._arrays.append(array)
            self._ends.append(len(array) + (self._ends[-1] if self._ends else 0))
        self._start, self._stop = start, self._ends[-1] if stop is None else min(stop, self._ends[-1])

    @property
    def start(self) -> int:
        """Number of the first vector among those of all files."""
        return self._start

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return self._arrays[0].shape[1]

    def __len__(self) -> int:
        return max(0, self._stop - self._start)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns an example; raises ValueError where it holds NaN or infinity."""
        at = self._start + index
        shard = bisect.bisect_right(self._ends, at)
        row = at - (self._ends[shard - 1] if shard else 0)
        vector = np.asarray(self._arrays[shard][row], np.float32)
        if not np.isfinite(vector).all():
            raise ValueError(f"{self.name}: {self._files[shard]}: row {row} holds NaN or infinity")
        return {"inputs": vector}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Returns examples."""
        return [self[i] for i in indices]
