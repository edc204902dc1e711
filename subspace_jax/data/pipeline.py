"""Batches for training and evaluation, by Grain, from anything that is read by index.

A global batch does not depend on the number of processes: with ``b = batch_size / num_processes`` examples each,
process ``p`` holds the examples ``p * b`` to ``(p + 1) * b`` of it.  The state of an iterator is the number of batches
that it has returned.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import jax
import numpy as np

if TYPE_CHECKING:
    import grain

__all__ = ["Source", "Transform", "eval_batches", "eval_passes", "load_arrays", "steps_per_epoch", "train_batches"]

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, np.random.Generator], Batch]


class Source(Protocol):
    """Examples by index, dicts of arrays with the same fields, such as ``inputs`` and ``labels``.

    If a source has ``__getitems__(indices)``, it is called with all indices of a batch.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]: ...


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of full batches in one epoch, ``num_examples // batch_size``."""
    return num_examples // batch_size


def load_arrays(source: Source) -> Batch:
    """Reads all examples of a source into memory, so that a batch costs a gather only.

    Args:
      source: The examples.

    Returns:
      Every field with the examples along a new first axis.

    Raises:
      ValueError: The source is empty, or its examples have different shapes.
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
    process: tuple[int, int] | None = None,
) -> grain.DatasetIterator:
    """Returns shuffled full batches, in a new order every epoch; the rest of an epoch is dropped.

    The batches are a function of ``(source, batch_size, seed, transform, repeats)`` and of their number alone.  The
    iterator's state is ``{"next_index": number of batches returned}``, the same on every process: ``get_state``,
    ``set_state``, and ``grain.checkpoint.CheckpointSave`` and ``CheckpointRestore`` with an Orbax
    ``CheckpointManager``.

    Args:
      source: Examples by index (for example from :func:`subspace_jax.data.image_source`), or a dict of arrays with
        examples along the first axis.
      batch_size: Examples in a batch over all processes; a multiple of their number.
      seed: Seed of order and transform, at least 0.
      transform: ``transform(example, rng) -> example``, applied to each example, such as
        :func:`subspace_jax.data.random_crop_flip`.  ``rng`` depends on the seed and on the example's position in the
        stream, not on the process.  Examples need a common shape only after it.
      repeats: Number of consecutive copies of an example, each transformed anew (repeated augmentation, arXiv
        1901.09335).  An epoch keeps its length, and shows one example in ``repeats``.
      num_epochs: Number of epochs; None for an infinite iterator.
      process: Index of this process and number of processes; those of JAX by default.

    Returns:
      An iterator over this process's part of each batch: every field of the source, ``[batch_size / num_processes,
      ...]``.

    Raises:
      ValueError: A number is out of range, the batch is larger than the source or no multiple of the processes, or
        fields have different lengths.
    """
    num_examples, read, read_each = _reader(source)
    own = _process_slice(batch_size, process)
    if batch_size > num_examples:
        raise ValueError(f"batch_size: expected at most the {num_examples} examples of the source, got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs: expected at least 1, or None, got {num_epochs}")
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    steps = steps_per_epoch(num_examples, batch_size)

    # A permutation per epoch instead of grain's shuffle, which takes some 20 us for each example.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, epoch)).permutation(num_examples)

    def batch(index: int) -> Batch:
        epoch, step = divmod(index, steps)
        indices = order(epoch)[(step * batch_size + np.asarray(own)) // repeats]
        if transform is None:
            return read(indices)
        first = index * batch_size + own.start
        examples = enumerate(read_each(indices))
        return _stack([transform(x, np.random.default_rng((seed, 1, first + i))) for i, x in examples])

    return _iterate(source, batch, sys.maxsize if num_epochs is None else num_epochs * steps)


def eval_batches(
    source: Source | Mapping[str, np.ndarray], *, batch_size: int, process: tuple[int, int] | None = None
) -> grain.DatasetIterator:
    """Returns one pass in order, every example once over all processes.

    The last batch is padded with zeros; ``mask`` is 0 for padding.  Every process gets the same number of batches, so
    that a last batch may be padding only on some.

    Args:
      source: See :func:`train_batches`.
      batch_size: Examples in a batch over all processes; a multiple of their number.  It may exceed the source.
      process: See :func:`train_batches`.

    Returns:
      An iterator as of :func:`train_batches`, with a further field ``mask``, float32 ``[batch_size / num_processes]``.

    Raises:
      ValueError: The batch is no multiple of the processes, a number is out of range, or fields have different lengths.
    """
    num_examples, read, _ = _reader(source)
    own = _process_slice(batch_size, process)

    def batch(index: int) -> Batch:
        indices = index * batch_size + np.arange(own.start, own.stop)
        mask = indices < num_examples
        # A process without examples reads one for the shapes of the fields.
        examples = read(indices[mask] if mask.any() else np.zeros(1, int))
        padded = {name: np.zeros((len(own), *values.shape[1:]), values.dtype) for name, values in examples.items()}
        for name, values in examples.items():
            padded[name][mask] = values[: mask.sum()]
        return {**padded, "mask": mask.astype(np.float32)}

    return _iterate(source, batch, -(-num_examples // batch_size))


def eval_passes(source: Source | Mapping[str, np.ndarray], eval_batch_size: int) -> Callable[[], grain.DatasetIterator]:
    """Returns a function that starts a pass of :func:`eval_batches`, for :class:`subspace_jax.train.DataSpec`.

    Args:
      source: See :func:`train_batches`.
      eval_batch_size: Examples in a batch over all processes.

    Raises:
      ValueError: ``eval_batch_size`` is out of range or no multiple of the processes.
    """
    _process_slice(eval_batch_size, None, name="eval_batch_size")
    # Padding takes as much memory and time as examples.
    examples = len(next(iter(source.values()), ())) if isinstance(source, Mapping) else len(source)
    most = max(4096, 2 * examples)
    if eval_batch_size > most:
        raise ValueError(f"eval_batch_size: expected at most {most} for {examples} examples, got {eval_batch_size}")
    return functools.partial(eval_batches, source, batch_size=eval_batch_size)


def _iterate(source: object, batch: Callable[[int], Batch], num_batches: int) -> grain.DatasetIterator:
    """Prefetches batches in threads."""
    import grain

    # Several threads help where files are decoded outside the interpreter's lock; on arrays they compete for it
    # (measured: 1.1 s for 50000 CIFAR crops with one thread, 1.8 s with two).
    threads = 1 if isinstance(source, Mapping) else min(8, os.cpu_count() or 1)
    # Grain's default buffer is 500 elements; an element here is a batch.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(options))


def _process_slice(batch_size: int, process: tuple[int, int] | None, name: str = "batch_size") -> range:
    """Returns the indices in a global batch that belong to a process."""
    index, count = (jax.process_index(), jax.process_count()) if process is None else process
    if not 0 <= index < count:
        raise ValueError(f"process: expected an index from 0 to {count - 1}, got {index}")
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {batch_size!r}")
    if batch_size % count:
        raise ValueError(f"{name}: expected a multiple of {count} processes, got {batch_size}")
    own = batch_size // count
    return range(index * own, (index + 1) * own)


def _reader(
    source: Source | Mapping[str, np.ndarray],
) -> tuple[int, Callable[[np.ndarray], Batch], Callable[[np.ndarray], Sequence[Mapping[str, np.ndarray]]]]:
    """Returns the number of examples, and functions from indices to stacked fields and to single examples."""
    if isinstance(source, Mapping):
        lengths = {name: len(values) for name, values in source.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"source: expected fields of one length, got {lengths}")
        num_examples = next(iter(lengths.values()), 0)
    else:
        num_examples = len(source)
    if num_examples < 1:
        raise ValueError("source: expected at least one example, got none")
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
                f"source: expected {name} of one shape in a batch, got {one} and {other}; resize them by "
                "transform, or by Images.map"
            )
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
