"""Streams made of one labeled set: its classes in groups, its pixels permuted, its images rotated."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from subspace_jax.continual.stream.tasks import Examples, Part, Stream, TaskData, make_stream

Labeled = Mapping[str, np.ndarray]


def class_groups(num_classes: int, num_tasks: int, seed: int | None = None) -> list[tuple[int, ...]]:
    """Divides classes into tasks of equal size, in order, or in an order that a seed draws.

    Args:
      num_classes: Number of classes.
      num_tasks: Number of tasks, which divides it.
      seed: Seed of the order; None for 0, 1, 2, ...

    Raises:
      ValueError: The tasks would not be of equal size.
    """
    if num_tasks < 1 or num_classes % num_tasks:
        raise ValueError(f"num_tasks: expected a number that divides {num_classes} classes, got {num_tasks}")
    order = np.arange(num_classes) if seed is None else np.random.default_rng(seed).permutation(num_classes)
    return [tuple(group.tolist()) for group in np.split(order, num_tasks)]


def split_classes(
    train: tuple[Examples, np.ndarray], test: tuple[Examples, np.ndarray], groups: Sequence[Sequence[int]]
) -> Stream:
    """Makes a stream whose tasks have classes of their own.

    Args:
      train: Examples with ``inputs`` and ``labels``, and their labels ``[examples]``, which are read without them.
      test: The same for evaluation.
      groups: The classes of each task.

    Raises:
      ValueError: A class is in two tasks or in none of the labels, a task has no classes, or no examples for training
        or evaluation.
    """
    labels = [np.asarray(part[1]) for part in (train, test)]
    seen: dict[int, int] = {}
    for t, group in enumerate(groups):
        if not len(group):
            raise ValueError(f"groups: expected classes in every task, got none in task {t}")
        for label in map(int, group):
            if label in seen:
                raise ValueError(f"groups: class {label} is in tasks {seen[label]} and {t}, expected it in one")
            seen[label] = t
    if unknown := sorted(set(seen) - set(np.unique(labels[0]).tolist())):
        raise ValueError(f"groups: expected classes of the training set, got {unknown}")
    tasks = []
    for group in groups:
        parts = []
        for (examples, _), own in zip((train, test), labels, strict=True):
            at = np.flatnonzero(np.isin(own, group))
            parts.append(_taken(examples, at, group) if isinstance(examples, Mapping) else Part(examples, at, group))
        name = "-".join(map(str, group)) if len(group) <= 4 else f"{group[0]}...{group[-1]}"
        tasks.append(TaskData(f"classes {name}", *parts, tuple(map(int, group))))
    return make_stream(tasks)


def _taken(examples: Labeled, at: np.ndarray, group: Sequence[int]) -> Labeled:
    position = {label: i for i, label in enumerate(group)}
    labels = np.asarray([position[int(label)] for label in np.asarray(examples["labels"])[at]], np.int32)
    return {**{name: np.asarray(values)[at] for name, values in examples.items()}, "labels": labels}


def permuted(train: Labeled, test: Labeled, num_tasks: int, seed: int = 0) -> Stream:
    """Makes a stream of the same set with its pixels permuted, differently in each task; the first is not permuted.

    Args:
      train: Arrays ``inputs [examples, ...]``, which are flattened, and ``labels [examples]``.
      test: The same for evaluation.
      num_tasks: Number of tasks, at least 1.
      seed: Seed of the permutations.

    Raises:
      ValueError: A number is out of range, or the arrays don't fit.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks: expected at least 1, got {num_tasks}")
    size, rng = math.prod(np.shape(train["inputs"])[1:]), np.random.default_rng(seed)
    tasks = []
    for t in range(num_tasks):
        order = rng.permutation(size) if t else np.arange(size)
        tasks.append(TaskData(f"permutation {t}", *(_flat(part, order) for part in (train, test))))
    return make_stream(tasks)


def _flat(part: Labeled, order: np.ndarray) -> Labeled:
    inputs = np.asarray(part["inputs"])
    return {**part, "inputs": inputs.reshape(len(inputs), -1)[:, order]}


def rotated(train: Labeled, test: Labeled, degrees: Sequence[float]) -> Stream:
    """Makes a stream of the same images rotated by an angle in each task, with zeros outside.

    Args:
      train: Arrays ``inputs [examples, height, width, ...]`` and ``labels [examples]``.
      test: The same for evaluation.
      degrees: Angle of each task.

    Raises:
      ValueError: Inputs are no images, two angles are the same, or there is none.
    """
    from scipy import ndimage

    if np.ndim(train["inputs"]) < 3:
        raise ValueError(f"inputs: expected images [examples, height, width, ...], got {np.shape(train['inputs'])}")
    tasks = []
    for angle in degrees:
        parts = []
        for part in (train, test):
            turned = ndimage.rotate(part["inputs"], angle, axes=(1, 2), reshape=False, order=1) if angle else None
            inputs = part["inputs"] if turned is None else turned
            parts.append({**part, "inputs": np.asarray(inputs, np.asarray(part["inputs"]).dtype)})
        tasks.append(TaskData(f"{angle:g} degrees", *parts))
    return make_stream(tasks)
