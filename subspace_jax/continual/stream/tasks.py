"""What a stream of tasks is: its examples, its checks, and the fingerprint by which a resumed run knows it."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from subspace_jax.data import Source
from subspace_jax.train.fields import nearest
from subspace_jax.train.overrides import form

Examples = Source | Mapping[str, np.ndarray]


class TaskData(NamedTuple):
    """The examples of one task.

    Attributes:
      name: Its name, unique in the stream.
      train: Examples for training: arrays by name with examples along the first axis, or a source by index.  Labels
        count from 0 within the task.
      test: Examples for evaluation, with the same fields.
      classes: The classes of the set that labels 0, 1, ... stand for; empty where the task has none.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[int, ...] = ()


class Part:
    """Some examples of a source, with labels that count from 0 within a task.

    Args:
      source: The examples by index, or arrays by name.
      indices: Which of them.
      classes: The classes in the order of their labels in the task; those of the source where empty.
    """

    def __init__(self, source: Examples, indices: Sequence[int], classes: Sequence[int] = ()):
        self._source, self.indices, self.classes = source, np.asarray(indices, np.int64), tuple(classes)
        self._labels = {label: position for position, label in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, np.ndarray]]:
        at = [int(self.indices[index]) for index in indices]
        if isinstance(self._source, Mapping):
            found = [{name: values[i] for name, values in self._source.items()} for i in at]
        elif hasattr(self._source, "__getitems__"):
            found = self._source.__getitems__(at)
        else:
            found = [self._source[i] for i in at]
        if not self._labels:
            return found
        return [{**example, "labels": np.int32(self._labels[int(example["labels"])])} for example in found]


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they arrive; :func:`make_stream` checks and makes it.

    Attributes:
      tasks: The tasks.
      num_classes: Classes of each task; 0 for a task without labels.
      shape: Shape of an input.
      fingerprint: Digest of names, sizes and examples.
    """

    tasks: tuple[TaskData, ...]
    num_classes: tuple[int, ...]
    shape: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tasks)

    def index(self, task: int | str) -> int:
        """Returns the position of a task, given that or its name.

        Raises:
          ValueError: There is no such task.
        """
        names = [found.name for found in self.tasks]
        if isinstance(task, str):
            if task in names:
                return names.index(task)
            raise ValueError(f"task: expected one of {names}, got {task!r}{nearest(task, names)}")
        if isinstance(task, bool) or not isinstance(task, int | np.integer) or not 0 <= task < len(names):
            raise ValueError(f"task: expected a name or a position from 0 to {len(names) - 1}, got {task!r}")
        return int(task)

    def ordered(self, order: Sequence[int | str]) -> "Stream":
        """Returns the stream of some of its tasks, in another order.

        Raises:
          ValueError: There is no such task, one comes twice, or there is none.
        """
        return make_stream(self.tasks[self.index(task)] for task in order)


def make_stream(tasks: Iterable[TaskData]) -> Stream:
    """Makes a stream of tasks.

    Args:
      tasks: The tasks, in the order in which they arrive.

    Raises:
      ValueError: There is no task, two have the same name, one has no examples, or examples or labels don't fit.
    """
    tasks = tuple(tasks)
    if not tasks or not all(isinstance(task, TaskData) for task in tasks):
        raise ValueError(f"tasks: expected at least one TaskData, got {form(tasks)}")
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tasks: expected names that differ, got {twice} more than once")
    digest, shapes, counts = hashlib.sha256(), {}, []
    for task in tasks:
        digest.update(repr((task.name, task.classes)).encode())
        found = [_describe(f"{task.name}: {split}", getattr(task, split), digest) for split in ("train", "test")]
        shapes |= {f"{task.name} {split}": shape for split, (shape, _) in zip(("train", "test"), found, strict=True)}
        counts.append(len(task.classes) or max(largest + 1 for _, largest in found))
        if any(largest >= counts[-1] for _, largest in found):
            raise ValueError(f"{task.name}: expected labels from 0 to {counts[-1] - 1}, got {found[0][1], found[1][1]}")
    first = next(iter(shapes.values()))
    if other := next((name for name, shape in shapes.items() if shape != first), None):
        raise ValueError(f"tasks: expected examples of one form, {first}, got {shapes[other]} in {other}")
    return Stream(tasks, tuple(counts), dict(first)["inputs"], digest.hexdigest()[:16])


def _describe(where: str, examples: Examples, digest) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], int]:
    """Adds examples to a digest; returns the shapes of their fields, and the largest label that is known, or -1."""
    if isinstance(examples, Mapping):
        sizes = {name: len(values) for name, values in examples.items()}
        if "inputs" not in sizes or len(set(sizes.values())) != 1:
            raise ValueError(f"{where}: expected inputs and other arrays with as many examples, got {sizes}")
        if not sizes["inputs"]:
            raise ValueError(f"{where}: expected at least one example, got none")
        if not np.isfinite(examples["inputs"]).all():
            raise ValueError(f"{where}: expected finite inputs, got NaN or infinity")
        for name, values in sorted(examples.items()):
            digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
        labels = np.asarray(examples.get("labels", [-1]))
        if labels.min() < -1 or ("labels" in examples and labels.min() < 0):
            raise ValueError(f"{where}: expected labels of at least 0, got {labels.min()}")
        shapes = {name: np.shape(values)[1:] for name, values in examples.items()}
        return tuple(sorted(shapes.items())), int(labels.max())
    if not len(examples):
        raise ValueError(f"{where}: expected at least one example, got none")
    digest.update(repr(len(examples)).encode())
    if isinstance(examples, Part):
        digest.update(examples.indices.tobytes() + repr(examples.classes).encode())
    shapes = {name: np.shape(value) for name, value in examples[0].items()}
    return tuple(sorted(shapes.items())), -1
