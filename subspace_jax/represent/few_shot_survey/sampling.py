"""Random shots: a few examples of each class."""

import jax
import numpy as np


def sample_shots(key: jax.Array, labels: np.ndarray, shots: int, num_classes: int | None = None) -> np.ndarray:
    """Draws examples of each class without replacement.

    The first ``k`` columns are the draw of ``k`` shots with the same key, so that draws of growing size are nested.

    Args:
      key: Random key; the draw depends on it, on the labels and their order alone.
      labels: ``[examples]`` integers, on the host.
      shots: Examples of each class.
      num_classes: Number of classes, each of which must have that many examples; by default those that occur.

    Returns:
      Indices of the examples ``[classes, shots]``, by class in ascending order.

    Raises:
      ValueError: ``shots`` is below 1, a label is outside the classes, or a class has too few examples.
    """
    labels = np.asarray(labels)
    if shots < 1:
        raise ValueError(f"shots: expected at least 1, got {shots}")
    if num_classes is not None and labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels: expected integers in 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}")
    classes = np.unique(labels) if num_classes is None else np.arange(num_classes)
    order = np.lexsort((np.asarray(jax.random.bits(key, labels.shape)), labels))
    first, last = (np.searchsorted(labels[order], classes, side) for side in ("left", "right"))
    if short := {int(c): int(n) for c, n in zip(classes, last - first, strict=True) if n < shots}:
        raise ValueError(f"shots: expected at most the examples of every class, got {shots}; class to count: {short}")
    return order[first[:, None] + np.arange(shots)]
