"""Labeled images by index, decoded when they are read."""

import copy
import errno
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm.auto import tqdm

__all__ = ["Images"]

ON_UNREADABLE = ("raise", "skip")

# Errors of the system that concern one file; others concern the disk or the network.
_OF_THE_FILE = frozenset({None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO})
_log = logging.getLogger(__name__)


class Images:
    """Labeled images by index: ``source[i]`` is ``{"inputs": uint8 [height, width, 3], "labels": int32 []}``.

    Returned by :func:`image_folder` and :func:`image_set`; a source for :func:`subspace_jax.data.train_batches`, with a
    transform that resizes.

    Attributes:
      name: Name of the set.
      class_names: Names of the labels.
      unreadable: Images that could not be decoded so far: name of the file or record to the error.
    """

    def __init__(
        self,
        name: str,
        count: int,
        read: Callable[[int], tuple[np.ndarray, int]],
        describe: Callable[[int], str],
        class_names: Sequence[str],
        on_unreadable: str = "raise",
        label_of: Callable[[int], int] | None = None,
    ):
        if on_unreadable not in ON_UNREADABLE:
            raise ValueError(f"on_unreadable: expected one of {ON_UNREADABLE}, got {on_unreadable!r}")
        self.name, self.class_names = name, tuple(class_names)
        self.unreadable: dict[str, str] = {}
        self._read, self._describe, self._change = read, describe, None
        self._label_of = label_of or (lambda index: read(index)[1])
        self._indices = range(count)
        if on_unreadable == "skip":
            failed = self._failures()
            self._indices = [index for index in range(count) if index not in failed]
            if not self._indices:
                raise ValueError(f"{name}: none of its {count} images can be read; {next(iter(failed.values()), '')}")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Decodes an image.

        Raises:
          IndexError: There is no such image.
          ValueError: It can't be decoded, or the function given to :meth:`map` raises.
          OSError: The system can't read its file.
        """
        index = self._indices[index]
        try:
            pixels, label = self._read(index)
        except Exception as error:
            raise self._failure(index, error) from error
        if self._change is not None:
            try:
                pixels = self._change(pixels)
            except ValueError as error:
                raise ValueError(f"{self._describe(index)}: {error}") from error
        return {"inputs": pixels, "labels": np.int32(label)}

    def __repr__(self) -> str:
        return f"Images({self.name!r}, {len(self)} images, {self.num_classes} classes)"

    def labels(self) -> np.ndarray:
        """Returns the labels of all images, int32 ``[images]``; those of folders and prepared sets decode no image."""
        return np.asarray([self._label_of(index) for index in self._indices], np.int32)

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Images":
        """Returns the same images with a function applied to the pixels of each.

        ``unreadable`` is shared.

        Args:
          change: From uint8 ``[height, width, 3]`` to any array, such as
            :class:`subspace_jax.data.ImageProcessor`.
        """
        other = copy.copy(self)
        inner = self._change
        other._change = change if inner is None else lambda pixels: change(inner(pixels))
        return other

    def check(self) -> dict[str, str]:
        """Decodes every image once, and returns those that can't be decoded: name to the error."""
        self._failures()
        return dict(self.unreadable)

    def _failures(self) -> dict[int, Exception]:
        """Decodes every image once, in threads, and collects the errors."""

        def attempt(index: int) -> Exception | None:
            try:
                self._read(index)
            except Exception as error:
                return error
            return None

        found = {}
        bar = tqdm(
            desc=f"Reading {self.name}",
            total=len(self),
            unit="image",
            delay=5,
            disable=jax.process_index() != 0,
            leave=False,
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for start in range(0, len(self), 4096):
                part = self._indices[start : start + 4096]
                for index, error in zip(part, pool.map(attempt, part), strict=True):
                    bar.update()
                    if error is not None:
                        found[index] = self._failure(index, error)
                        # All processes have to skip the same images.
                        if isinstance(found[index], OSError):
                            raise found[index] from error
        return found

    def _failure(self, index: int, error: Exception) -> Exception:
        """Records that an image can't be decoded; errors of the system, which may be transient, are not recorded."""
        name = self._describe(index)
        why = " ".join(str(error).split()).removeprefix(f"{name}: ")
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
            return OSError(error.errno, f"{name}: {error.strerror}")
        if name not in self.unreadable:
            self.unreadable[name] = f"{type(error).__name__}: {why}"
            _log.warning("%s: %s; %d so far in %s", name, why, len(self.unreadable), self.name)
        return ValueError(f"{name}: {why}; on_unreadable='skip' (--skip-unreadable) skips such images")
