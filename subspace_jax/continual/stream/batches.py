"""The data of a phase that trains one task of a stream and evaluates all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subspace_jax import data, train
from subspace_jax.continual.stream.tasks import Examples, Stream


class TaskExamples:
    """The examples of some tasks, one after another, with the position of their task as ``task``, int32.

    Args:
      parts: Examples of each task.
      tasks: Position of each of these tasks in the stream.
    """

    def __init__(self, parts: Sequence[Examples], tasks: Sequence[int]):
        self._parts, self._tasks = list(parts), list(tasks)
        sizes = [len(part["inputs"]) if isinstance(part, Mapping) else len(part) for part in parts]
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        at, examples = index - int(self._ends[part - 1]) * (part > 0), self._parts[part]
        found = {name: x[at] for name, x in examples.items()} if isinstance(examples, Mapping) else examples[at]
        return {**found, "task": np.int32(self._tasks[part])}


def examples_of(parts: Sequence[Examples], tasks: Sequence[int]) -> Examples:
    """Returns the examples of some tasks with their positions as ``task``: arrays where all parts are arrays."""
    if not all(isinstance(part, Mapping) for part in parts):
        return TaskExamples(parts, tasks)
    ids = [np.full(len(part["inputs"]), t, np.int32) for part, t in zip(parts, tasks, strict=True)]
    joined = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    return {**joined, "task": np.concatenate(ids)}


class _Marked:
    """Batches of one or more iterators side by side, whose position names the stream and refuses another one."""

    def __init__(self, iterators: Sequence[Any], stream: Stream):
        self._iterators, self._mark = list(iterators), stream.fingerprint

    def __iter__(self) -> "_Marked":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        batches = [next(iterator) for iterator in self._iterators]
        if len(batches) == 1:
            return batches[0]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def get_state(self) -> dict[str, Any]:
        return {**self._iterators[0].get_state(), "stream": self._mark}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if state.get("stream") != self._mark:
            raise ValueError(
                f"stream: the run began with other tasks, of fingerprint {state.get('stream')}, got {self._mark}"
            )
        own = {name: value for name, value in state.items() if name != "stream"}
        for iterator in self._iterators:
            iterator.set_state(own)


def task_data(
    stream: Stream,
    tasks: Sequence[int],
    *,
    batch_size: int,
    eval_batch_size: int = 0,
    replay: Examples | None = None,
    sets: Mapping[str, Examples] | None = None,
) -> train.DataSpec:
    """Makes the data of a phase: batches of some tasks, and the set "eval" with the test examples of all tasks.

    Every example has the position of its task as ``task``, int32.  A position in these batches holds the fingerprint of
    the stream: a run that resumes with other tasks raises a ValueError.

    Args:
      stream: The stream.
      tasks: Positions of the tasks to train.
      batch_size: Examples in a batch over all processes.
      eval_batch_size: Those in a batch of evaluation; ``batch_size`` by default.
      replay: Examples with ``task``, from which another ``batch_size`` examples join each batch.
      sets: Further sets for evaluators, of examples with ``task``.

    Raises:
      ValueError: A size can't serve, or there is no such task.
    """
    at = [stream.index(t) for t in tasks]
    own = examples_of([stream.tasks[t].train for t in at], at)
    everything = examples_of([task.test for task in stream.tasks], range(len(stream)))
    sources = [own] if replay is None else [own, replay]

    def batches(seed: int) -> _Marked:
        found = [
            data.train_batches(source, batch_size=batch_size, seed=(seed + i) % 2**32)
            for i, source in enumerate(sources)
        ]
        return _Marked(found, stream)

    evaluated = {"eval": everything, **(sets or {})}
    passes = {name: data.eval_passes(source, eval_batch_size or batch_size) for name, source in evaluated.items()}
    one = next(batches(0))
    count = len(own["inputs"]) if isinstance(own, Mapping) else len(own)
    return train.DataSpec(
        batch=train.batch_shapes(one, batch_size * len(sources)),
        train=batches,
        evaluate=passes,
        steps_per_epoch=data.steps_per_epoch(count, batch_size),
    )
