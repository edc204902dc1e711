"""How well a few examples of each class serve to tell the classes apart, over several draws of them."""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from subspace_jax.represent.linear_probe import check_examples, linear_probe, probe_logits, scores_of


class FewShot(NamedTuple):
    """Accuracy with a few examples of each class.

    Attributes:
      shots: Examples of each class.
      accuracies: That of each draw.
      mean: Their mean.
      interval: Half the width of the 95 % confidence interval of the mean, by Student's t; NaN of a single draw.
    """

    shots: int
    accuracies: tuple[float, ...]
    mean: float
    interval: float


def few_shot(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    shots: int,
    seeds: int = 5,
    l2: float = 1e-2,
    loss: str = "logistic",
    mesh: Mesh | None = None,
) -> FewShot:
    """Fits a linear classifier to a few examples of each class, several times, and tests each on all test examples.

    The penalty is given, for so few examples leave none to choose it on.

    Args:
      features: ``[examples, n]``, from which the few are drawn.
      labels: ``[examples]`` integers from 0.
      test_features: ``[test examples, n]``.
      test_labels: ``[test examples]``.
      shots: Examples of each class.
      seeds: Number of draws.
      l2: Penalty, in the units of :func:`subspace_jax.represent.linear_probe`.
      loss: "logistic" or "hinge".
      mesh: Rows are split over it; all devices by default.

    Returns:
      The accuracies, their mean and its interval.

    Raises:
      ValueError: A class has too few examples, or shapes, labels or numbers can't serve.
    """
    features, labels, num_classes = check_examples(features, labels)
    classes, counts = np.unique(labels, return_counts=True)
    if shots < 1 or seeds < 1:
        raise ValueError(f"shots, seeds: expected at least 1, got {shots} and {seeds}")
    if short := {int(label): int(count) for label, count in zip(classes, counts, strict=True) if count < shots}:
        raise ValueError(f"shots: expected at most the examples of every class, got {shots}; class to count: {short}")
    accuracies = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rows = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in classes])
        # One shape for all draws, and so one program.
        probe = linear_probe(features[rows], labels[rows], num_classes=num_classes, grid=(l2,), loss=loss, mesh=mesh)
        predicted = np.argmax(probe_logits(probe, np.asarray(test_features)), axis=-1)
        accuracies.append(scores_of(predicted, np.asarray(test_labels)).accuracy)
    return FewShot(shots, tuple(accuracies), float(np.mean(accuracies)), _interval(accuracies))


def _interval(values: list[float]) -> float:
    if len(values) < 2:
        return float("nan")
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
