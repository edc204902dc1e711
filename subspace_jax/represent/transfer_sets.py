"""Transfer of features to other image sets."""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from subspace_jax import data, metrics
from subspace_jax.represent.features import open_labelled_images
from subspace_jax.represent.features_file import Features
from subspace_jax.represent.few_shot import few_shot
from subspace_jax.represent.linear_probe import linear_probe, probe_logits, scores_of
from subspace_jax.represent.neighbors import nearest_classes

# TFDS name -> (training split, test split), the sets of arXiv 2308.01547, table 3.
TRANSFER_SETS = {
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "food101": ("train", "validation"),
    "oxford_iiit_pet": ("train", "test"),
    "cars196": ("train", "test"),
    "oxford_flowers102": ("train+validation", "test"),
}
METHODS = ("logistic", "svm", "knn", "few-shot")
_TEST_FOLDERS = ("test", "val", "validation")


class ProbeReport(NamedTuple):
    """Quality of the features of an image set.

    Attributes:
      accuracy: Test accuracy; for "few-shot" the mean over draws.
      class_accuracy: Mean of the test accuracies of the classes; None for "few-shot".
      variability: Mean angle between two test examples of a class, in degrees.
      separation: Class separation R^2 of the test examples.
      detail: Chosen penalty, number of neighbours or confidence interval, as text.
    """

    accuracy: float
    class_accuracy: float | None
    variability: float
    separation: float
    detail: str


def probe_features(
    train_set: Features,
    test_set: Features,
    method: str = "logistic",
    *,
    l2: float | None = None,
    neighbours: int = 20,
    shots: int = 5,
    seeds: int = 5,
) -> ProbeReport:
    """Measures how well features separate classes, and how much they vary within a class.

    Args:
      train_set: Features to fit to.
      test_set: Features to measure, of the same model and classes.
      method: "logistic" or "svm" (:func:`subspace_jax.represent.linear_probe`), "knn"
        (:func:`subspace_jax.represent.nearest_classes`) or "few-shot" (:func:`subspace_jax.represent.few_shot`).
      l2: Penalty of linear classifiers, as in :func:`subspace_jax.represent.linear_probe`; by default it is chosen on
        held-out examples, and 0.01 for "few-shot".
      neighbours: Number of neighbours of "knn".
      shots: Training examples per class of "few-shot".
      seeds: Number of draws of "few-shot".

    Returns:
      The report.

    Raises:
      ValueError: The sets differ in width or classes, the method is unknown, or an option is invalid.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    _check_pair(train_set, test_set)
    x, y = train_set.features, train_set.labels
    class_accuracy = None
    if method == "few-shot":
        penalty = {} if l2 is None else {"l2": l2}
        found = few_shot(train_set, test_set, shots=shots, seeds=seeds, **penalty)
        accuracy, detail = found.mean, f"{shots} shots, {seeds} draws, 95 % interval +- {found.interval:.4f}"
    else:
        if method == "knn":
            classes = len(train_set.class_names)
            predicted = nearest_classes(x, y, test_set.features, k=neighbours, num_classes=classes)
            detail = f"{neighbours} neighbours"
        else:
            grid = {} if l2 is None else {"grid": (l2,)}
            classes = len(train_set.class_names)
            loss = "hinge" if method == "svm" else "logistic"
            probe = linear_probe(x, y, num_classes=classes, loss=loss, **grid)
            predicted = np.argmax(probe_logits(probe, test_set.features), axis=-1)
            detail = f"penalty {probe.l2:.3g}"
            if probe.validation:
                detail += f", {probe.validation[probe.l2]:.4f} on held-out examples"
        accuracy, class_accuracy = scores_of(predicted, test_set.labels)
    return ProbeReport(
        accuracy,
        class_accuracy,
        float(metrics.intra_class_variability(test_set.features, test_set.labels)),
        float(metrics.class_separation_r2(test_set.features, test_set.labels)),
        detail,
    )


def open_transfer_set(
    name: str, data_dir: str | os.PathLike | None = None, *, on_unreadable: str = "raise"
) -> tuple[data.Images, data.Images]:
    """Opens the training and test images of a set.

    Args:
      name: One of :data:`TRANSFER_SETS`; any other TFDS set with the splits "train" and "test"; or a folder with the
        folders "train" and "test" (or "val", or "validation").
      data_dir: Folder of prepared TFDS sets; TFDS's default by default.
      on_unreadable: See :func:`open_labelled_images`.

    Returns:
      Training and test images.

    Raises:
      FileNotFoundError: The folder does not exist, or the set is not prepared; the message says how to prepare it.
      ValueError: TFDS has no such set, or its examples are not labelled images.
    """
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        test = next((part for part in _TEST_FOLDERS if (folder / part).is_dir()), _TEST_FOLDERS[0])
        train_images = open_labelled_images(name, "train", on_unreadable=on_unreadable)
        names = train_images.class_names
        return train_images, open_labelled_images(name, test, class_names=names, on_unreadable=on_unreadable)
    splits = TRANSFER_SETS.get(name, ("train", "test"))
    return tuple(open_labelled_images(name, split, data_dir, on_unreadable=on_unreadable) for split in splits)


def _check_pair(train_set: Features, test_set: Features) -> None:
    widths = train_set.features.shape[1], test_set.features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"features: expected sets of one width, got {widths[0]} and {widths[1]}")
    if train_set.class_names == test_set.class_names:
        return
    if len(train_set.class_names) != len(test_set.class_names):
        counts = len(train_set.class_names), len(test_set.class_names)
        raise ValueError(f"classes: expected the same classes, got {counts[0]} in training and {counts[1]} in test")
    pairs = zip(train_set.class_names, test_set.class_names, strict=True)
    label, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"classes: expected the same classes, but label {label} is {one!r} in training and {other!r} in test"
    )
