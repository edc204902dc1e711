"""Class-balanced batches within clusters of examples, and images with a shape and a texture (arXiv 2206.09068)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    import grain

SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("rows", "columns", "checks", "plain")
SIDE = 16


def class_balanced_batches(
    examples: Mapping[str, np.ndarray],
    assignment: np.ndarray,
    *,
    batch_size: int,
    per_class: int,
    seed: int,
    process: tuple[int, int] | None = None,
) -> grain.DatasetIterator:
    """Returns endless batches with as many examples of each of their classes, each batch within one cluster.

    Batch after batch the clusters take turns.  Classes of a batch, and examples of a class, are drawn without
    replacement; where there are too few, they come more than once.  An example that is alone of its class in its
    cluster is not drawn, nor is one in cluster -1.  A batch is a function of its number and of the arguments alone, the
    number of processes aside; the state of the iterator is the number of batches that it has returned, so that an
    iterator over other clusters may go on there.

    Args:
      examples: Arrays with examples along the first axis, among them ``labels``, integers.
      assignment: Cluster of each example, ``[examples]`` integers.
      batch_size: Examples in a batch over all processes; a multiple of ``per_class`` and of the processes.
      per_class: Examples of a class in a batch, at least 2.
      seed: Seed, at least 0.
      process: Index of this process and number of processes; those of JAX by default.

    Returns:
      An iterator over this process's part of each batch: the fields of ``examples``, and ``cluster``, int32.

    Raises:
      ValueError: There are no labels, a class has fewer than 2 examples, a number is out of range, or no cluster has
        two examples of one class.
    """
    import grain

    check_classes(examples, batch_size, per_class)
    if np.shape(assignment) != np.shape(examples["labels"]):
        raise ValueError(
            f"assignment: expected a cluster for each of {len(examples['labels'])} examples, got shape "
            f"{np.shape(assignment)}"
        )
    index, count = (jax.process_index(), jax.process_count()) if process is None else process
    if batch_size % count:
        raise ValueError(f"batch_size: expected a multiple of {count} processes, got {batch_size}")
    own = slice(index * (batch_size // count), (index + 1) * (batch_size // count))
    clusters = _members(np.asarray(examples["labels"]), np.asarray(assignment))
    if not clusters:
        raise ValueError("assignment: expected a cluster with two examples of a class, got none")

    def batch(number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, number))
        cluster, classes = clusters[number % len(clusters)]
        slots = batch_size // per_class
        rounds = -(-slots // len(classes))
        order = np.concatenate([rng.permutation(len(classes)) for _ in range(rounds)])[:slots]
        drawn = [rng.choice(classes[c], per_class, replace=len(classes[c]) < per_class) for c in order]
        chosen = np.concatenate(drawn)[own]
        fields = {name: np.asarray(rows)[chosen] for name, rows in examples.items()}
        return {**fields, "cluster": np.full(len(chosen), cluster, np.int32)}

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(sys.maxsize).map(batch).to_iter_dataset(options))


def check_classes(examples: Mapping[str, np.ndarray], batch_size: int, per_class: int) -> None:
    """Raises a ValueError where batches of these sizes can't be class-balanced; see :func:`class_balanced_batches`."""
    if "labels" not in examples or not np.issubdtype(np.asarray(examples["labels"]).dtype, np.integer):
        raise ValueError(f"labels: expected integers beside {sorted(set(examples) - {'labels'})}, got none")
    if per_class < 2:
        raise ValueError(f"per_class: expected at least 2 examples of a class, got {per_class}")
    if batch_size < 2 * per_class or batch_size % per_class:
        raise ValueError(
            f"batch_size: expected a multiple of per_class = {per_class}, of at least 2 classes, got {batch_size}"
        )
    classes, counts = np.unique(examples["labels"], return_counts=True)
    if np.any(counts < 2):
        few = {int(c): int(n) for c, n in zip(classes, counts, strict=True) if n < 2}
        raise ValueError(f"labels: expected at least 2 examples of each class, got {few}")
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least 2 classes, got {len(classes)}")


def _members(labels: np.ndarray, assignment: np.ndarray) -> list[tuple[int, list[np.ndarray]]]:
    """Returns each cluster with the indices of its examples, class by class, without classes of one example."""
    found = []
    for cluster in np.unique(assignment[assignment >= 0]):
        inside = np.flatnonzero(assignment == cluster)
        inside = inside[np.argsort(labels[inside], kind="stable")]
        starts = np.flatnonzero(np.diff(labels[inside])) + 1
        if classes := [rows for rows in np.split(inside, starts) if len(rows) > 1]:
            found.append((int(cluster), classes))
    return found


def shape_texture(seed: int, num_examples: int) -> dict[str, np.ndarray]:
    """Draws images of one of four shapes filled with one of four textures.

    A disc, square, triangle or cross of 10 to 14 pixels, a little rotated and displaced, is filled with rows, columns
    or checks of random phase, or plain; contrast varies, and there is noise.  A label stands for both attributes, so
    that an embedding has to tell apart what either of them alone does not.

    Args:
      seed: Seed, at least 0.
      num_examples: Number of images.

    Returns:
      ``inputs`` float32 ``[num_examples, 16, 16, 1]``; ``shape`` and ``texture``, int32 in ``[0, 4)``; and ``labels``,
      int32, ``4 shape + texture``.

    Raises:
      ValueError: There is no image.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples: expected at least 1, got {num_examples}")
    rng = np.random.default_rng((seed, 1))
    shape, texture = (rng.integers(4, size=num_examples).astype(np.int32) for _ in range(2))

    def uniform(low, high):
        return rng.uniform(low, high, (num_examples, 1, 1))

    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    y, x = (grid[None] - (SIDE - 1) / 2 - uniform(-2, 2) for grid in (rows, columns))
    angle, radius = uniform(-0.4, 0.4), uniform(5, 7)
    u, v = (np.cos(angle) * x + np.sin(angle) * y) / radius, (np.cos(angle) * y - np.sin(angle) * x) / radius
    insides = (
        np.hypot(u, v) < 0.9,
        np.maximum(np.abs(u), np.abs(v)) < 0.8,
        (v < 0.6) & (np.abs(u) < (v + 1) * 0.65),
        (np.minimum(np.abs(u), np.abs(v)) < 0.3) & (np.maximum(np.abs(u), np.abs(v)) < 1),
    )
    phases = rng.integers(4, size=(2, num_examples, 1, 1))
    down, across = ((grid[None] + phase) // 2 % 2 for grid, phase in zip((rows, columns), phases, strict=True))
    fills = (down, across, down ^ across, np.ones_like(down))
    inside, fill = (np.choose(kind[:, None, None], images) for kind, images in ((shape, insides), (texture, fills)))
    image = uniform(0.6, 1) * inside * (0.4 + 0.6 * fill) + 0.07 * rng.standard_normal(inside.shape)
    labels = (4 * shape + texture).astype(np.int32)
    return {"inputs": image[..., None].astype(np.float32), "labels": labels, "shape": shape, "texture": texture}
