"""Batches for training and evaluation, by Grain, from anything that is read by index.

A global batch is the same whatever the number of processes: with ``b = batch_size / process_count`` rows each,
process ``p`` holds the rows ``p * b`` to ``(p + 1) * b`` of it.  All that an iterator has to remember is the number
of batches that it has given.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import grain
import jax
import numpy as np

__all__ = ["Source", "Transform", "eval_batches", "eval_passes", "load_arrays", "steps_per_epoch", "train_batches"]

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, np.random.Generator], Batch]


class Source(Protocol):
    """Examples by index, each a dict with at least ``inputs`` and ``labels``.

    A source with ``__getitems__(indices)`` has it called with all the rows of a batch.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole batches in one pass, ``num_examples // batch_size``."""
    return num_examples // batch_size


def load_arrays(source: Source) -> Batch:
    """Decodes a whole source into memory; batches of it then cost a gather, which pays for any set that fits.

    Args:
      source: The examples.

    Returns:
      Every field with all examples along a new first axis: ``inputs`` ``[examples, ...]``, ``labels`` ``[examples]``.

    Raises:
      ValueError: The source is empty or lacks a field.
    """
    num_examples, read, _ = _reader(source)
    return read(np.arange(num_examples))


def train_batches(
    source: Source | Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    repeats: int = 1,
    num_epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator:
    """Shuffled batches of whole size, in a new order every epoch; what an epoch has over is left out.

    The batches are a function of ``(source, batch_size, seed, transform, repeats)`` and of their number alone.  The
    iterator's state is ``{"next_index": number of batches given}``, the same on every process: ``get_state``,
    ``set_state``, and ``grain.checkpoint.CheckpointSave`` and ``CheckpointRestore`` with an Orbax
    ``CheckpointManager``.

    Args:
      source: Examples by index (such as :func:`subspace_jax.data.image_source` gives), or a dict of arrays with
        examples along the first axis.
      batch_size: Rows of a batch over all processes; a multiple of ``process_count``.
      seed: Seed of order and transform, at least 0.
      transform: ``transform(example, rng) -> example``, applied to each example, such as
        :func:`subspace_jax.data.random_crop_flip`.  ``rng`` depends on the seed and on the example's place in the
        stream, not on the process.  Examples need one shape only after it.
      repeats: How often an example comes in a row, changed by ``transform`` anew each time (repeated augmentation,
        arXiv 1901.09335).  An epoch keeps its length, and so shows one example in ``repeats``.
      num_epochs: Epochs after which the iterator ends; None goes on for ever.
      process_index: This process; ``jax.process_index()`` by default.
      process_count: All processes; ``jax.process_count()`` by default.

    Returns:
      An iterator over this process's rows: ``inputs`` ``[batch_size / process_count, ...]``, ``labels``
      ``[batch_size / process_count]``, and whatever other fields the source has.

    Raises:
      ValueError: A number is out of range, the batch is larger than the source or can't be split over the processes,
        or a field is missing or of another length.
    """
    num_examples, read, read_each = _reader(source)
    rows = _process_rows(batch_size, process_index, process_count)
    if batch_size > num_examples:
        raise ValueError(f"batch_size: expected at most the {num_examples} examples of the source, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs: expected at least 1, or None for no end, got {num_epochs}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    steps = steps_per_epoch(num_examples, batch_size)

    # A permutation per epoch, rather than grain's shuffle: that takes some 20 us for each row.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, epoch)).permutation(num_examples)

    def batch(index: int) -> Batch:
        epoch, step = divmod(index, steps)
        indices = order(epoch)[(step * batch_size + np.asarray(rows)) // repeats]
        if transform is None:
            return read(indices)
        place = index * batch_size + rows.start
        examples = enumerate(read_each(indices))
        return _stack([transform(x, np.random.default_rng((seed, 1, place + i))) for i, x in examples])

    return _iterate(source, batch, sys.maxsize if num_epochs is None else num_epochs * steps)


def eval_batches(
    source: Source | Mapping[str, np.ndarray],
    *,
    batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator:
    """One pass in order, every example once over all processes.

    The last batch is filled up to the full size with zeros; ``mask`` tells the rows that count.  Every process gets
    the same number of batches, so that a last batch may hold nothing but filling on some.

    Args:
      source: As for :func:`train_batches`.
      batch_size: Rows of a batch over all processes; a multiple of ``process_count``.  It may exceed the source.
      process_index: This process; ``jax.process_index()`` by default.
      process_count: All processes; ``jax.process_count()`` by default.

    Returns:
      An iterator over this process's rows, as :func:`train_batches` has them, with ``mask``, float32
      ``[batch_size / process_count]``: 1 for an example, 0 for filling.

    Raises:
      ValueError: The batch can't be split over the processes, a number is out of range, or a field is missing or of
        another length.
    """
    num_examples, read, _ = _reader(source)
    rows = _process_rows(batch_size, process_index, process_count)

    def batch(index: int) -> Batch:
        indices = index * batch_size + np.arange(rows.start, rows.stop)
        mask = indices < num_examples
        # A process without any example left reads one all the same, for the shapes of the fields.
        examples = read(indices[mask] if mask.any() else np.zeros(1, int))
        filled = {name: np.zeros((len(rows), *values.shape[1:]), values.dtype) for name, values in examples.items()}
        for name, values in examples.items():
            filled[name][mask] = values[: mask.sum()]
        return {**filled, "mask": mask.astype(np.float32)}

    return _iterate(source, batch, -(-num_examples // batch_size))


def eval_passes(source: Source | Mapping[str, np.ndarray], eval_batch_size: int) -> Callable[[], grain.DatasetIterator]:
    """Returns what begins a pass of :func:`eval_batches`, as :class:`subspace_jax.train.Data` takes it.

    Args:
      source: As for :func:`train_batches`.
      eval_batch_size: Rows of a batch over all processes.

    Raises:
      ValueError: ``eval_batch_size`` can't be split over the processes; now, and not at the first evaluation.
    """
    _process_rows(eval_batch_size, None, None, name="eval_batch_size")
    # All beyond the source is padding, which takes as much memory and time as examples.
    examples = len(next(iter(source.values()), ())) if isinstance(source, Mapping) else len(source)
    most = max(4096, 2 * examples)
    if eval_batch_size > most:
        raise ValueError(f"eval_batch_size: expected at most {most} rows for so few examples, got {eval_batch_size}")
    return functools.partial(eval_batches, source, batch_size=eval_batch_size)


def _iterate(source: object, batch: Callable[[int], Batch], num_batches: int) -> grain.DatasetIterator:
    """Computes batches ahead, in threads."""
    # Several threads pay where files are decoded with the interpreter's lock released; on arrays they only fight for
    # it (measured: 1.1 s for 50000 CIFAR crops with one thread, 1.8 s with two).
    threads = 1 if isinstance(source, Mapping) else min(8, os.cpu_count() or 1)
    # Grain's default buffer is 500 elements, and an element here is a whole batch.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(options))


def _process_rows(
    batch_size: int, process_index: int | None, process_count: int | None, name: str = "batch_size"
) -> range:
    """Returns the rows of a global batch that belong to a process."""
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: expected 0 to {process_count - 1}, got {process_index}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"{name}: expected a positive multiple of {process_count} processes, got {batch_size}")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _reader(
    source: Source | Mapping[str, np.ndarray],
) -> tuple[int, Callable[[np.ndarray], Batch], Callable[[np.ndarray], Sequence[Mapping[str, np.ndarray]]]]:
    """Returns the number of examples, and functions from indices ``[rows]`` to whole fields and to single examples."""
    if isinstance(source, Mapping):
        lengths = {name: len(values) for name, values in source.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"source: expected fields of one length, got {lengths}")
        num_examples, fields = next(iter(lengths.values()), 0), source.keys()
    else:
        num_examples = len(source)
        fields = source[0].keys() if num_examples else ()
    if num_examples < 1:
        raise ValueError("source: expected at least one example, got none")
    missing = sorted({"inputs", "labels"} - set(fields))
    if missing:
        raise ValueError(f"source: expected the fields inputs and labels, got {sorted(fields)}; missing: {missing}")
    if isinstance(source, Mapping):
        arrays = {name: np.asarray(values) for name, values in source.items()}
        return (
            num_examples,
            lambda indices: {name: values[indices] for name, values in arrays.items()},
            lambda indices: [{name: values[i] for name, values in arrays.items()} for i in indices],
        )
    read_many = getattr(source, "__getitems__", None) or (lambda indices: [source[i] for i in indices])
    return (
        num_examples,
        lambda indices: _stack(read_many(indices.tolist())),
        lambda indices: read_many(indices.tolist()),
    )


def _stack(examples: Sequence[Mapping[str, np.ndarray]]) -> Batch:
    for name in examples[0]:
        shapes = {np.shape(example[name]) for example in examples}
        if len(shapes) > 1:
            one, other, *_ = (list(shape) for shape in sorted(shapes))
            raise ValueError(
                f"source: expected {name} of one shape in a batch, got {one} and {other}; bring them to one, by "
                "transform, or by map of images"
            )
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
