"""Images of any size with labels, by index: folders of files and sets of TensorFlow Datasets, decoded by Pillow.

What comes out is bytes ``[height, width, 3]``; :mod:`subspace_jax.data.images.augment` brings them to one size.
"""

import copy
import errno
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from tqdm.auto import tqdm

from subspace_jax.data.images.decode import decode_image
from subspace_jax.data.sources.tfds import checked_label, missing_folder, open_labelled_records

__all__ = ["Images", "image_folder", "image_set"]

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
ON_UNREADABLE = ("raise", "skip")

# Folders that systems and archives leave behind, besides those that begin with a dot.
_NO_CLASSES = frozenset({"__MACOSX", "@eaDir", "lost+found"})
# Of a file that has these, the file is to blame; of any other error of the system, the disk or the network is.
_OF_THE_FILE = frozenset({None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO})
_log = logging.getLogger(__name__)


class Images:
    """Labelled images by index: ``source[i]`` is ``{"inputs": uint8 [height, width, 3], "labels": int32 []}``.

    Made by :func:`image_folder` and :func:`image_set`; a source for :func:`subspace_jax.data.train_batches`, with a
    transform that brings images to one size.

    Attributes:
      name: Name of the set.
      class_names: Names of the labels.
      unreadable: What could not be decoded so far: name of the file or record to what was wrong.
    """

    def __init__(
        self,
        name: str,
        count: int,
        read: Callable[[int], tuple[np.ndarray, int]],
        describe: Callable[[int], str],
        class_names: Sequence[str],
        on_unreadable: str = "raise",
    ):
        if on_unreadable not in ON_UNREADABLE:
            raise ValueError(f"on_unreadable: expected one of {ON_UNREADABLE}, got {on_unreadable!r}")
        self.name, self.class_names = name, tuple(class_names)
        self.unreadable: dict[str, str] = {}
        self._read, self._describe, self._change = read, describe, None
        self._indices = range(count)
        if on_unreadable == "skip":
            failed = self._failures()
            self._indices = [index for index in range(count) if index not in failed]
            if not self._indices:
                raise ValueError(
                    f"{name}: not one of its {count} images can be read; {next(iter(failed.values()), '')}"
                )

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Decodes an image.

        Raises:
          IndexError: There is no such image.
          ValueError: It can't be decoded, or the function of :meth:`map` refuses it.
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

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Images":
        """Returns the same images, each changed by a function of its pixels, as evaluation needs it.

        What can't be read is counted for both together.

        Args:
          change: From uint8 ``[height, width, 3]`` to any array, such as
            :class:`subspace_jax.data.EvalImage`.
        """
        other = copy.copy(self)
        inner = self._change
        other._change = change if inner is None else lambda pixels: change(inner(pixels))
        return other

    def check(self) -> dict[str, str]:
        """Decodes every image once, and returns those that can't be: name to what was wrong."""
        self._failures()
        return dict(self.unreadable)

    def _failures(self) -> dict[int, Exception]:
        """Decodes every image once, in threads, and notes those that can't be."""

        def attempt(index: int) -> Exception | None:
            try:
                self._read(index)
            except Exception as error:
                return error
            return None

        found = {}
        bar = tqdm(
            desc=f"reads {self.name}",
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
                        # With several processes each reads all, and what they leave out has to be the same.
                        if isinstance(found[index], OSError):
                            raise found[index] from error
        return found

    def _failure(self, index: int, error: Exception) -> Exception:
        """Notes that an image can't be decoded; an error of the system, which may pass, is no fault of the image."""
        name = self._describe(index)
        why = " ".join(str(error).split()).removeprefix(f"{name}: ")
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
            return OSError(error.errno, f"{name}: {error.strerror}")
        if name not in self.unreadable:
            self.unreadable[name] = f"{type(error).__name__}: {why}"
            _log.warning("%s: %s; %d so far in %s", name, why, len(self.unreadable), self.name)
        return ValueError(f"{name}: {why}; on_unreadable='skip' (--skip-unreadable) leaves such images out")


def image_folder(
    folder: str | os.PathLike, *, class_names: Sequence[str] | None = None, on_unreadable: str = "raise"
) -> Images:
    """Opens a folder with one folder for each class, as ImageNet is laid out by most.

    Args:
      folder: Has a folder for each class; images lie in it at any depth, told by their suffix.  Links are followed.
        What begins with a dot is passed over, as are the folders that archives and file servers leave behind.
      class_names: Names of the classes in the order of their labels; all folders by name by default.  A validation set
        is given those of its training set.
      on_unreadable: "raise", or "skip" to leave out images that can't be read: all are decoded once to find them, and
        they are named in ``unreadable`` and in a warning.

    Returns:
      The images, in the order of their paths.

    Raises:
      FileNotFoundError: There is no such folder.
      ValueError: It has no folders of classes, other classes than ``class_names``, or one without images; or with
        "skip" not one image can be read.
      OSError: The system can't read a file, whatever ``on_unreadable`` says.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(missing_folder(folder))
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_left_behind(entry.name))
    names = found if class_names is None else list(class_names)
    if not names:
        raise ValueError(f"{folder}: expected a folder for each class, found none")
    missing, unexpected = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing or unexpected:
        raise ValueError(
            f"{folder}: expected the {len(names)} classes of class_names, found {len(found)}; missing: {missing[:8]}; "
            f"unexpected: {unexpected[:8]}"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        own = sorted(_files_below(str(folder / name), ()))
        if not own:
            raise ValueError(f"{folder / name}: no images; expected files ending in one of {sorted(SUFFIXES)}")
        files += own
        labels += [label] * len(own)

    def read(index: int) -> tuple[np.ndarray, int]:
        return decode_image(files[index]), labels[index]

    return Images(str(folder), len(files), read, lambda index: files[index], names, on_unreadable)


def _is_left_behind(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _files_below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yields the images at any depth; a link back to a folder above is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_left_behind(entry.name):
                continue
            if entry.is_dir():
                yield from _files_below(entry.path, (*above, real))
            # A link to nowhere is an image that can't be read; a pipe or a socket would be waited for.
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
                yield entry.path


def image_set(
    name: str, split: str, data_dir: str | os.PathLike | None = None, *, on_unreadable: str = "raise"
) -> Images:
    """Opens a split of a prepared image set of TensorFlow Datasets; images may vary in size.

    Nothing is downloaded, and TensorFlow is not needed: see :mod:`subspace_jax.data.prepare`.

    Args:
      name: TFDS name, such as ``"imagenet2012"``, ``"oxford_flowers102"`` or ``"digits"``.
      split: TFDS split, slices included.
      data_dir: Folder of TFDS sets; :func:`subspace_jax.data.default_data_dir` by default.
      on_unreadable: As of :func:`image_folder`.

    Returns:
      The images, decoded by :func:`decode_image`; the 16 levels of ``digits`` are spread to 255.

    Raises:
      FileNotFoundError: The set is not prepared; the message holds the command that prepares it.
      ValueError: Name or split is unknown, or the set is not one of 8-bit images with one label each.
    """
    records, info = open_labelled_records(name, split, data_dir)
    image, label = info.supervised_keys
    largest, num_classes = 16 if info.name == "digits" else 255, info.features[label].num_classes

    def read(index: int) -> tuple[np.ndarray, int]:
        record = records[index]
        pixels = decode_image(record[image])
        if largest != 255:
            pixels = np.round(pixels * (255 / largest)).astype(np.uint8)
        return pixels, checked_label(record[label], num_classes)

    def describe(index: int) -> str:
        return f"{info.name} {split} record {index}"

    return Images(f"{info.name} {split}", len(records), read, describe, info.features[label].names, on_unreadable)
