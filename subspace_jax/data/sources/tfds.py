"""Labeled images from TensorFlow Datasets (TFDS), by index and without TensorFlow."""

import difflib
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from subspace_jax.data.images.decode import decode_image
from subspace_jax.data.sources.images import Images

__all__ = ["ImageSource", "default_data_dir", "describe_images", "image_set", "image_source"]


def default_data_dir() -> str:
    """Returns the folder of TFDS sets: ``TFDS_DATA_DIR`` if set, else ``~/tensorflow_datasets``."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


class ImageSource:
    """Labeled images by index: ``source[i]`` is ``{"inputs": float32 [height, width, channels], "labels": int32 []}``.

    Returned by :func:`image_source`.

    Attributes:
      name: Name of the set.
      split: Split.
      num_classes: Number of classes.
      image_shape: ``(height, width, channels)``.
    """

    def __init__(self, records: Sequence[Any], info: Any, split: str, scale: np.ndarray, shift: np.ndarray):
        self.name = info.name
        self.split = split
        self._records = records
        self._image, self._label = info.supervised_keys
        self.image_shape = tuple(info.features[self._image].shape)
        self.num_classes = info.features[self._label].num_classes
        self._scale, self._shift = scale, shift

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Reads several examples at once, which is faster than one at a time."""
        try:
            records = self._records.__getitems__(indices)
        except RuntimeError as error:  # of array_record
            raise OSError(f"{self.name} {self.split}: can't read records: {' '.join(str(error).split())}") from error
        return [self._example(record, index) for record, index in zip(records, indices, strict=True)]

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, {self.split!r}, {len(self)} images {list(self.image_shape)})"

    def _example(self, record: dict[str, Any], index: int) -> dict[str, np.ndarray]:
        try:
            rgb = decode_image(record[self._image])
            label = checked_label(record[self._label], self.num_classes)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name} {self.split} record {index}: {error}") from error
        pixels = rgb[..., : self.image_shape[-1]]
        if pixels.shape != self.image_shape or (rgb != pixels).any():
            raise ValueError(
                f"{self.name} {self.split} record {index}: expected an image {list(self.image_shape)}, got "
                f"{list(rgb.shape)}"
            )
        return {"inputs": pixels.astype(np.float32) * self._scale + self._shift, "labels": label}


def checked_label(label: Any, num_classes: int) -> np.int32:
    """Returns a label as int32.

    Raises:
      ValueError: There is no such class; a split without labels holds -1.
    """
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label}, expected 0 to {num_classes - 1}")
    return np.int32(label)


def image_source(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageSource:
    """Opens a split of an image set, for :func:`subspace_jax.data.train_batches` and :func:`eval_batches`.

    ``digits`` (:class:`subspace_jax.data.sources.digits.Digits`) is prepared on first use, offline.  Other sets have to
    be prepared in array_record format (:mod:`subspace_jax.data.prepare`); nothing is downloaded.  Pixels are divided by
    255, those of ``digits`` by 16.

    Args:
      name: TFDS name, such as ``"digits"``, ``"cifar10"`` or ``"some_set/config:1.0.0"``.
      split: TFDS split, slices included: ``"train"``, ``"train[:90%]"``, ``"train[1000:]"``.
      data_dir: Folder of TFDS sets; :func:`default_data_dir` by default.
      mean: Mean of each channel of the scaled pixels, subtracted; needs ``std``.
      std: Standard deviation of each channel, divided by; needs ``mean``.

    Returns:
      The images, with ``num_classes`` and ``image_shape``.

    Raises:
      FileNotFoundError: The set is not prepared in ``data_dir``; the message has the command that prepares it.
      OSError: ``digits`` can't be written to ``data_dir``.
      ValueError: Name or split is unknown, the set does not hold labeled images of one size with one or three 8-bit
        channels, it is prepared in a format without random access, or ``mean`` and ``std`` are invalid.
    """
    records, info = open_labeled_records(name, split, data_dir)
    shape, _ = _labeled_images(info)
    if None in shape:
        raise ValueError(f"name: expected images of one size, but those of {name!r} vary: shape {list(shape)}")
    scale, shift = _affine(16 if info.name == "digits" else 255, mean, std, shape[-1])
    return ImageSource(records, info, split, scale, shift)


def image_set(
    name: str, split: str, data_dir: str | os.PathLike | None = None, *, on_unreadable: str = "raise"
) -> Images:
    """Opens a split of a prepared image set of TensorFlow Datasets; images may vary in size.

    Nothing is downloaded, and TensorFlow is not needed; see :mod:`subspace_jax.data.prepare`.

    Args:
      name: TFDS name, such as ``"imagenet2012"``, ``"oxford_flowers102"`` or ``"digits"``.
      split: TFDS split, slices included.
      data_dir: Folder of TFDS sets; :func:`subspace_jax.data.default_data_dir` by default.
      on_unreadable: See :func:`image_folder`.

    Returns:
      The images, decoded by :func:`decode_image`; the 16 levels of ``digits`` are scaled to 255.

    Raises:
      FileNotFoundError: The set is not prepared; the message has the command that prepares it.
      ValueError: Name or split is unknown, or the set does not hold 8-bit images with one label each.
    """
    records, info = open_labeled_records(name, split, data_dir)
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

    def label_of(index: int) -> int:
        return int(checked_label(records[index][label], num_classes))

    names = info.features[label].names
    return Images(f"{info.name} {split}", len(records), read, describe, names, on_unreadable, label_of)


def describe_images(name: str, data_dir: str | os.PathLike | None = None) -> tuple[tuple[int | None, ...], int]:
    """Returns image shape and number of classes of an image set, without reading it; it need not be prepared.

    Args:
      name: See :func:`image_source`.
      data_dir: See :func:`image_source`.

    Returns:
      Shape of an image, with None for a dimension that varies, and the number of classes.

    Raises:
      ValueError: TFDS has no such set, or it does not hold labeled images.
    """
    import tensorflow_datasets as tfds

    data_dir = default_data_dir() if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    try:
        builder = _builder(name, data_dir)
    except FileNotFoundError:
        check_name(name, data_dir)
        try:
            builder = tfds.builder(name, try_gcs=False)  # its code alone
        except Exception as error:  # TFDS has several, and asserts
            raise ValueError(f"name: TFDS has no {name!r}: {str(error).splitlines()[0]}") from error
    return _labeled_images(builder.info)


def open_records(name: str, split: str, data_dir: str | os.PathLike | None = None) -> tuple[Sequence[Any], Any]:
    """Returns the records of a split of any prepared set, by index and decoded by TFDS, and the set's ``DatasetInfo``.

    Raises:
      FileNotFoundError: The set is not prepared in ``data_dir``; the message has the command that prepares it.
      ValueError: Name or split is unknown, or the set is prepared in a format without random access.
    """
    data_dir = default_data_dir() if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    builder = _builder(name, data_dir)
    return _records(builder, split, name, data_dir), builder.info


def open_labeled_records(name: str, split: str, data_dir: str | os.PathLike | None = None) -> tuple[Sequence[Any], Any]:
    """Opens a split of labeled images like :func:`open_records`, without decoding the images.

    TFDS decodes by the packages that are installed, returns indices of palettes, and ignores the orientation.

    Raises:
      FileNotFoundError: See :func:`open_records`.
      ValueError: See :func:`open_records`; or the set does not hold labeled 8-bit images.
    """
    import tensorflow_datasets as tfds

    data_dir = default_data_dir() if data_dir is None else os.path.expanduser(os.fspath(data_dir))
    builder = _builder(name, data_dir)
    _labeled_images(builder.info)
    encoded = {builder.info.supervised_keys[0]: tfds.decode.SkipDecoding()}
    return _records(builder, split, name, data_dir, encoded), builder.info


def _builder(name: str, data_dir: str) -> Any:
    """Finds a prepared set by its files; its code may access the network."""
    import tensorflow_datasets as tfds

    base = re.split("[/:]", name)[0]
    there = pathlib.Path(data_dir) / base
    if name == "digits":
        from subspace_jax.data.sources.digits import prepare_digits

        there = prepare_digits(data_dir)
    try:
        if name == "digits":
            return tfds.builder_from_directory(there)
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        pass
    except Exception as error:  # of damaged files, and of names that can't be parsed
        if base.isidentifier() and there.is_dir():
            raise ValueError(f"name: the set in {there} is damaged: {' '.join(str(error).split())}") from error
        check_name(name, data_dir)
        raise ValueError(f"name: {name!r} is no name of a set, such as 'cifar10' or 'set/config:1.0.0'") from error
    check_name(name, data_dir)
    raise FileNotFoundError(
        f"the set {name!r} is not prepared under {data_dir}. On a machine with network, run\n"
        f"  {_prepare_command(name, data_dir)}\n"
        "and copy the folder here if it is another machine's."
    )


def check_name(name: str, data_dir: str) -> None:
    """Checks that TFDS has a set.

    Args:
      name: TFDS name.
      data_dir: Folder that was searched, for the message.

    Raises:
      FileNotFoundError: The name looks like a path.
      ValueError: There is no such set; the message has similar names.
    """
    import tensorflow_datasets as tfds

    base = re.split("[/:]", name)[0]
    known = [*tfds.list_builders(with_community_datasets=False), "digits"]
    if base not in known:
        if os.sep in name or name.startswith((".", "~")) or re.search(r"\.[A-Za-z]\w*$", name):
            raise FileNotFoundError(missing_folder(pathlib.Path(name).expanduser()))
        near = difflib.get_close_matches(base, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see https://www.tensorflow.org/datasets"
        raise ValueError(f"name: TFDS knows no set {base!r}, and there is none below {data_dir}; {hint}")


def missing_folder(folder: pathlib.Path) -> str:
    """Returns the message about a path that is no image folder, with similar names beside it."""
    if folder.is_dir():
        return f"{folder}: expected a set of TensorFlow Datasets by name, got a folder"
    there = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, there, n=3)
    what = "a file, expected a folder" if folder.exists() else "no such folder"
    return f"{folder}: {what} of images" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


def _prepare_command(name: str, data_dir: str) -> str:
    python = os.path.basename(sys.executable) or "python"
    return shlex.join([python, "-m", "subspace_jax.data.prepare", name, "--data_dir", data_dir])


def _labeled_images(info: Any) -> tuple[tuple[int | None, ...], int]:
    """Returns image shape and number of classes; raises where the set does not hold labeled images."""
    import tensorflow_datasets as tfds

    keys = info.supervised_keys
    features = [info.features[key] for key in keys] if keys and len(keys) == 2 else []
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if not features or not all(map(isinstance, features, kinds)):
        held = " ".join(str(info.features).split())
        raise ValueError(f"name: expected a set of labeled images, but {info.name!r} holds {held}")
    shape = tuple(features[0].shape)
    dtype = np.dtype(features[0].np_dtype)
    if dtype != np.uint8 or shape[-1] not in (1, 3, None):
        raise ValueError(
            f"name: expected images of one or three 8-bit channels, but those of {info.name!r} are {dtype} "
            f"{list(shape)}"
        )
    return shape, features[1].num_classes


def _records(
    builder: Any, split: str, name: str, data_dir: str, decoders: dict[str, Any] | None = None
) -> Sequence[Any]:
    splits = sorted(builder.info.splits)
    # TFDS raises several exceptions for a split that it can't read, none of which lists the splits.
    if re.split(r"[\[+]", split)[0] not in splits:
        raise ValueError(f"split: {name!r} has no split {split!r}, only {splits} and slices such as 'train[:90%]'")
    try:
        return builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"name: {name!r} is prepared under {data_dir} as {builder.info.file_format.value}, which can't be read by "
            f"index. Prepare it again, into another folder:\n  {_prepare_command(name, data_dir + '_array_record')}"
        ) from error
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(
            f"split: can't read {split!r} of {name!r}, which has {splits} and slices such as 'train[:90%]'"
        ) from error


def _affine(
    largest: int, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale and shift, float32 ``[channels]``, of ``(pixels / largest - mean) / std``."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std: expected both or none, got mean = {mean} and std = {std}")
    mean = np.zeros(channels) if mean is None else np.asarray(mean, np.float64)
    std = np.ones(channels) if std is None else np.asarray(std, np.float64)
    for label, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,):
            raise ValueError(f"{label}: expected {channels} numbers, one a channel, got shape {list(value.shape)}")
    if not (np.isfinite(std) & (std > 0)).all() or not np.isfinite(mean).all():
        raise ValueError(
            f"std: expected positive numbers, and mean finite ones, got {std.tolist()} and {mean.tolist()}"
        )
    return (1 / (largest * std)).astype(np.float32), (-mean / std).astype(np.float32)
