"""Scores of a stream of tasks, from the matrix of accuracies: ``acc[i, j]`` on task ``j`` after training task ``i``."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike


def final_accuracy(acc: ArrayLike) -> float:
    """Returns the mean over all tasks after the last one.

    Args:
      acc: ``[tasks, tasks]``.

    Raises:
      ValueError: The matrix is not square, empty, or holds NaN.
    """
    return float(_checked(acc)[-1].mean())


def average_accuracy(acc: ArrayLike) -> float:
    """Returns the mean, over tasks, of the accuracy on all tasks so far right after each.

    Other arguments: see :func:`final_accuracy`.
    """
    acc = _checked(acc)
    return float(np.mean([row[: i + 1].mean() for i, row in enumerate(acc)]))


def forgetting(acc: ArrayLike) -> float:
    """Returns the mean, over all tasks but the last, of the best accuracy since a task was trained minus the last one.

    0 for one task.  Other arguments: see :func:`final_accuracy`.
    """
    acc = _checked(acc)
    lost = [acc[j:, j].max() - acc[-1, j] for j in range(len(acc) - 1)]
    return float(np.mean(lost)) if lost else 0.0


def backward_transfer(acc: ArrayLike) -> float:
    """Returns the mean, over all tasks but the last, of the last accuracy minus the one right after training.

    0 for one task (Lopez-Paz and Ranzato, arXiv 1706.08840, equation 3).  Other arguments: see :func:`final_accuracy`.
    """
    acc = _checked(acc)
    moved = acc[-1, :-1] - np.diag(acc)[:-1]
    return float(moved.mean()) if len(moved) else 0.0


def forward_transfer(acc: ArrayLike, baseline: ArrayLike) -> float:
    """Returns the mean, over all tasks but the first, of the accuracy before training minus a baseline.

    0 for one task (arXiv 1706.08840, equation 4).

    Args:
      acc: See :func:`final_accuracy`.
      baseline: ``[tasks]``, accuracies of an untrained model, such as one over the number of classes.

    Raises:
      ValueError: See there, or the baseline does not fit.
    """
    acc, baseline = _checked(acc), np.asarray(baseline, np.float64)
    if baseline.shape != acc.shape[:1] or not np.isfinite(baseline).all():
        raise ValueError(f"baseline: expected finite [{len(acc)}], got shape {baseline.shape}")
    gained = np.diag(acc, 1) - baseline[1:]
    return float(gained.mean()) if len(gained) else 0.0


def mtil_metrics(acc: ArrayLike) -> Mapping[str, float | np.ndarray]:
    """Returns the scores of the benchmark MTIL (as restated with arXiv 2605.19301).

    Args:
      acc: See :func:`final_accuracy`; all entries count, those before training too.

    Returns:
      ``transfer_per_task [tasks - 1]``, the means before training of tasks from the second on, ``avg_per_task`` and
      ``last_per_task [tasks]``; their means ``transfer`` (NaN for one task), ``avg`` and ``last``; ``forgetting``.

    Raises:
      ValueError: See :func:`final_accuracy`.
    """
    acc = _checked(acc)
    transfer = np.asarray([acc[:j, j].mean() for j in range(1, len(acc))])
    per_task = {"transfer_per_task": transfer, "avg_per_task": acc.mean(axis=0), "last_per_task": acc[-1].copy()}
    means = {
        name.removesuffix("_per_task"): float(x.mean()) if len(x) else float("nan") for name, x in per_task.items()
    }
    return {**per_task, **means, "forgetting": forgetting(acc)}


def _checked(acc: ArrayLike) -> np.ndarray:
    acc = np.asarray(acc, np.float64)
    if acc.ndim != 2 or acc.shape[0] != acc.shape[1] or not acc.size:
        raise ValueError(f"acc: expected a square matrix [tasks, tasks], got shape {acc.shape}")
    if not np.isfinite(acc).all():
        raise ValueError(f"acc: expected finite accuracies, got {int((~np.isfinite(acc)).sum())} that are not")
    return acc
