"""Transfer of features to other data: the six sets of the Grassmann study, and what is measured on each."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from subspace_jax import data, metrics
from subspace_jax.represent.features import open_labelled_images
from subspace_jax.represent.features_file import Features
from subspace_jax.represent.few_shot import few_shot
from subspace_jax.represent.linear_probe import linear_probe, probe_logits, scores_of
from subspace_jax.represent.neighbors import nearest_classes

# Of arXiv 2308.01547, table 3, by their TFDS names; the splits to fit and to test on.
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
    """What features of one set are worth.

    Attributes:
      accuracy: Share of the test examples that are right; with "few-shot" a mean over draws.
      class_accuracy: Its mean over the classes; None with "few-shot".
      variability: Mean angle between two test examples of a class, in degrees.
      separation: Class separation R^2 of the test examples.
      detail: What the method chose or found besides, in words.
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
    mesh: Mesh | None = None,
) -> ProbeReport:
    """Measures features: how well they tell classes apart, and how they spread.

    Args:
      train_set: What is fitted to.
      test_set: What is measured on, of the same model and classes.
      method: "logistic" or "svm" (:func:`subspace_jax.represent.linear_probe`), "knn"
        (:func:`subspace_jax.represent.nearest_classes`) or "few-shot" (:func:`subspace_jax.represent.few_shot`).
      l2: Penalty of linear classifiers, in the units of :func:`subspace_jax.represent.linear_probe`; by default chosen
        on held-out examples, and 0.01 for "few-shot".
      neighbours: Of "knn".
      shots: Of "few-shot".
      seeds: Draws of "few-shot".
      mesh: Rows are split over it; all devices by default.

    Returns:
      The figures.

    Raises:
      ValueError: The sets have other widths or classes, the method is unknown, or a number can't serve.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    _check_pair(train_set, test_set)
    x, y = train_set.features, train_set.labels
    class_accuracy = None
    if method == "few-shot":
        penalty = {} if l2 is None else {"l2": l2}
        found = few_shot(x, y, test_set.features, test_set.labels, shots=shots, seeds=seeds, mesh=mesh, **penalty)
        accuracy, detail = found.mean, f"{shots} shots, {seeds} draws, 95 % interval +- {found.interval:.4f}"
    else:
        if method == "knn":
            classes = len(train_set.class_names)
            predicted = nearest_classes(x, y, test_set.features, k=neighbours, num_classes=classes, mesh=mesh)
            detail = f"{neighbours} neighbours"
        else:
            grid = {} if l2 is None else {"grid": (l2,)}
            classes = len(train_set.class_names)
            loss = "hinge" if method == "svm" else "logistic"
            probe = linear_probe(x, y, num_classes=classes, loss=loss, mesh=mesh, **grid)
            predicted = np.argmax(probe_logits(probe, test_set.features), axis=-1)
            detail = f"penalty {probe.l2:.3g}"
            if probe.validation:
                detail += f", {probe.validation[probe.l2]:.4f} on the held-out part"
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
    """Opens what is fitted to and what is tested on.

    Args:
      name: One of :data:`TRANSFER_SETS`; any other TFDS set with the splits "train" and "test"; or a folder with the
        folders "train" and "test" (or "val", or "validation").
      data_dir: Folder of TFDS sets; the usual place by default.
      on_unreadable: See :func:`open_labelled_images`.

    Returns:
      Training and test images.

    Raises:
      FileNotFoundError: There is no such folder, or the set is not prepared; the message says how to.
      ValueError: TFDS knows no such set, or it is not one of labelled images.
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
        raise ValueError(f"features: expected those of one model, got {widths[0]} and {widths[1]} numbers an example")
    if train_set.class_names == test_set.class_names:
        return
    if len(train_set.class_names) != len(test_set.class_names):
        counts = len(train_set.class_names), len(test_set.class_names)
        raise ValueError(f"classes: expected those of one set, got {counts[0]} to fit to and {counts[1]} to test on")
    pairs = zip(train_set.class_names, test_set.class_names, strict=True)
    label, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"classes: expected those of one set, but label {label} is {one!r} to fit to and {other!r} to test"
    )
