"""Image folders with one folder for each class."""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from subspace_jax.data.images.decode import decode_image
from subspace_jax.data.sources.images import Images
from subspace_jax.data.sources.tfds import missing_folder

__all__ = ["image_files", "image_folder"]

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
# Folders left behind by systems and archives, besides those that begin with a dot.
_NO_CLASSES = frozenset({"__MACOSX", "@eaDir", "lost+found"})


def image_folder(
    folder: str | os.PathLike, *, class_names: Sequence[str] | None = None, on_unreadable: str = "raise"
) -> Images:
    """Opens a folder with one folder for each class, the common layout of ImageNet.

    Args:
      folder: Has a folder for each class, with images at any depth, recognized by their suffix.  Links are followed.
        Names that begin with a dot are ignored, as are folders left behind by archives and file servers.
      class_names: Names of the classes in the order of their labels; all folders in order of their names by default.
        For a validation set, pass those of the training set.
      on_unreadable: "raise", or "skip" to skip images that can't be read: all are decoded once to find them; they are
        listed in ``unreadable`` and in a warning.

    Returns:
      The images, in the order of their paths.

    Raises:
      FileNotFoundError: There is no such folder.
      ValueError: It has no folders of classes, other classes than ``class_names``, or a class without images; or no
        image can be read.
      OSError: The system can't read a file, whatever ``on_unreadable``.
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

    return Images(str(folder), len(files), read, lambda index: files[index], names, on_unreadable, labels.__getitem__)


def image_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Returns the images in a folder, at any depth, in the order of their paths; see :func:`image_folder`.

    Raises:
      FileNotFoundError: There is no such folder.
      ValueError: It has no images.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(missing_folder(folder))
    found = sorted(map(pathlib.Path, _files_below(str(folder), ())))
    if not found:
        raise ValueError(f"{folder}: no images; expected files ending in one of {sorted(SUFFIXES)}")
    return found


def _is_left_behind(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _files_below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Yields the images at any depth; links to a parent folder are not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_left_behind(entry.name):
                continue
            if entry.is_dir():
                yield from _files_below(entry.path, (*above, real))
            # A broken link is an unreadable image; reading a pipe or a socket would block.
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
                yield entry.path
