"""Few-shot classification on fixed features by logistic regression.

:mod:`subspace_jax.represent.few_shot_survey` compares it with the methods that know texts about the classes.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from subspace_jax.represent.features_file import Features
from subspace_jax.represent.few_shot_survey.sampling import sample_shots
from subspace_jax.represent.linear_probe import check_examples, linear_probe, probe_logits, scores_of


class FewShot(NamedTuple):
    """Few-shot accuracy.

    Attributes:
      shots: Training examples per class.
      accuracies: Test accuracy of each draw.
      mean: Mean of the accuracies.
      interval: Half the width of the 95 % confidence interval of the mean, by Student's t; NaN for a single draw.
    """

    shots: int
    accuracies: tuple[float, ...]
    mean: float
    interval: float


def few_shot(
    train_set: Features,
    test_set: Features,
    *,
    shots: int,
    seeds: int = 5,
    l2: float = 1e-2,
    loss: str = "logistic",
    mesh: Mesh | None = None,
) -> FewShot:
    """Fits a linear classifier to a few random examples of each class, and tests it on all test examples.

    The penalty is fixed, as so few examples leave none to hold out.

    Args:
      train_set: Examples to draw from.
      test_set: Test examples.
      shots: Training examples per class.
      seeds: Number of draws, each with a classifier of its own.
      l2: Penalty, as in :func:`subspace_jax.represent.linear_probe`.
      loss: "logistic" or "hinge".
      mesh: Mesh over which the examples are sharded; all devices by default.

    Returns:
      The accuracies, their mean and its confidence interval.

    Raises:
      ValueError: A class has too few examples, or a shape, a label or an option is invalid.
    """
    features, labels, num_classes = check_examples(train_set.features, train_set.labels)
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    accuracies = []
    for seed in range(seeds):
        rows = sample_shots(jax.random.key(seed), labels, shots).ravel()
        # All draws have one shape, and share one compiled program.
        probe = linear_probe(features[rows], labels[rows], num_classes=num_classes, grid=(l2,), loss=loss, mesh=mesh)
        predicted = np.argmax(probe_logits(probe, np.asarray(test_set.features)), axis=-1)
        accuracies.append(scores_of(predicted, np.asarray(test_set.labels)).accuracy)
    return FewShot(shots, tuple(accuracies), float(np.mean(accuracies)), _interval(accuracies))


def _interval(values: list[float]) -> float:
    if len(values) < 2:
        return float("nan")
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
