"""Images of any size with labels, by index: folders of files and sets of TensorFlow Datasets, decoded by Pillow.

What comes out is bytes ``[height, width, 3]``; :mod:`subspace_jax.data.image_augment` brings them to one size.
"""

import copy
import io
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from subspace_jax.data.sources import _not_about_opencv, open_records

__all__ = ["Images", "decode_image", "image_folder", "image_set"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ON_UNREADABLE = ("raise", "skip")

# All that Pillow, TFDS and damaged files were seen to raise; Pillow says SyntaxError of a broken PNG.
_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)
_log = logging.getLogger(__name__)


def decode_image(source: bytes | str | os.PathLike) -> np.ndarray:
    """Decodes an image file.

    Gray is repeated, what is transparent is blended on white, of an animation the first frame is taken.

    Args:
      source: The file, or its bytes.

    Returns:
      uint8 ``[height, width, 3]``.

    Raises:
      OSError: The file is no image, or cut off.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16 bits at 255 where it converts them itself.
        wide = np.asarray(image).astype(np.float64) / 257
        return np.repeat(np.clip(np.round(wide), 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


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
        self._count, self._read, self._describe, self._on_unreadable = count, read, describe, on_unreadable
        self._lock, self._change = threading.Lock(), None

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Decodes an image; in the place of one that can't be read comes the next one that can, or an error."""
        index = range(self._count)[index]
        for step in range(self._count):
            example = self._example((index + step) % self._count)
            if example is not None:
                return example
        raise ValueError(f"{self.name}: not one of its {self._count} images can be read, {self._count} failed")

    def __repr__(self) -> str:
        return f"Images({self.name!r}, {self._count} images, {self.num_classes} classes)"

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
        for index in range(self._count):
            try:
                self._read(index)
            except _ERRORS as error:
                self._note(index, error)
        return dict(self.unreadable)

    def _example(self, index: int) -> dict[str, np.ndarray] | None:
        try:
            pixels, label = self._read(index)
        except _ERRORS as error:
            self._note(index, error)
            if self._on_unreadable == "raise":
                raise ValueError(
                    f"{self._describe(index)}: can't be read as an image: {error}; on_unreadable='skip' takes the next "
                    "one instead"
                ) from error
            return None
        return {"inputs": pixels if self._change is None else self._change(pixels), "labels": np.int32(label)}

    def _note(self, index: int, error: Exception) -> None:
        name = self._describe(index)
        with self._lock:
            new = name not in self.unreadable
            self.unreadable[name] = f"{type(error).__name__}: {error}"
            total = len(self.unreadable)
        if new:
            _log.warning("%s: can't be read as an image (%s); %d so far in %s", name, error, total, self.name)


def image_folder(
    folder: str | os.PathLike, *, class_names: Sequence[str] | None = None, on_unreadable: str = "raise"
) -> Images:
    """Opens a folder with one folder for each class, as ImageNet is laid out by most.

    Args:
      folder: Has a folder for each class; images lie in it at any depth, told by their suffix.
      class_names: Names of the classes in the order of their labels; all folders by name by default.  A validation set
        is given those of its training set.
      on_unreadable: "raise", or "skip" to take the next image instead of one that can't be read.  It is named and
        counted in ``unreadable`` and in a warning either way.

    Returns:
      The images, in the order of their paths.

    Raises:
      FileNotFoundError: There is no such folder.
      ValueError: It has no folders of classes, other classes than ``class_names``, or one without images.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
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
        own = sorted(
            os.path.join(root, file)
            for root, _, entries in os.walk(folder / name)
            for file in entries
            if os.path.splitext(file)[1].lower() in SUFFIXES
        )
        if not own:
            raise ValueError(f"{folder / name}: no images; expected files ending in one of {sorted(SUFFIXES)}")
        files += own
        labels += [label] * len(own)

    def read(index: int) -> tuple[np.ndarray, int]:
        return decode_image(files[index]), labels[index]

    return Images(str(folder), len(files), read, lambda index: files[index], names, on_unreadable)


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
      The images; gray ones are repeated to three channels, and the 16 levels of ``digits`` spread to 255.

    Raises:
      FileNotFoundError: The set is not prepared; the message holds the command that prepares it.
      ValueError: Name or split is unknown, or the set is not one of images with one label each.
    """
    import tensorflow_datasets as tfds

    records, info = open_records(name, split, data_dir)
    # TFDS decodes with Pillow, on which this library depends, and would warn once that OpenCV is not there.
    logging.getLogger("absl").addFilter(_not_about_opencv)
    keys = info.supervised_keys
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if not keys or len(keys) != 2 or not all(isinstance(info.features[k], t) for k, t in zip(keys, kinds, strict=True)):
        raise ValueError(f"name: expected a set of labelled images, but {info.name!r} holds {info.features}")
    image, label = keys
    largest = 16 if info.name == "digits" else 255

    def read(index: int) -> tuple[np.ndarray, int]:
        record = records[index]
        pixels = np.asarray(record[image])
        if largest != 255:
            pixels = np.round(pixels * (255 / largest)).astype(np.uint8)
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
            raise ValueError(f"expected bytes of one or three channels, got {pixels.dtype} {list(pixels.shape)}")
        return pixels, int(record[label])

    def describe(index: int) -> str:
        return f"{info.name} {split} record {index}"

    return Images(f"{info.name} {split}", len(records), read, describe, info.features[label].names, on_unreadable)
